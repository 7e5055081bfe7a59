// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/indexer/paged_indexer_logits/paged_indexer_logits.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<PagedIndexerLogitsArgs> forward("indexer", "paged_indexer_logits",
                                               {{"cpu", DeviceType::cpu, paged_indexer_logits_cpu}});

void check_cache(const Check& check, const PagedIndexerLogitsArgs& a) {
  constexpr std::int64_t any = Check::kAny;
  const std::int64_t d = a.q.size(3);
  const bool bytes = element_size(a.cache.dtype) == 1, fp8_only = a.q.dtype == DType::float8_e4m3fn;
  if (fp8_only || (bytes && a.q.dtype != DType::float64)) {
    check.tensor("cache", a.cache, "[pages, page_size, 1, d + 4]", {any, any, 1, d + 4},
                 {DType::uint8, DType::int8, DType::float8_e4m3fn});
    const std::int64_t page_size = a.cache.size(1);
    check.that(page_size <= 1 || a.cache.numel() == 0 || a.cache.stride[1] == d + 4, "cache",
               "d + 4 = " + std::to_string(d + 4) + " bytes per entry in a page", a.cache.stride[1]);
  } else {
    check.tensor("cache", a.cache, "[pages, page_size, 1, d]", {any, any, 1, d}, {a.q.dtype});
  }
  check.unit_last_stride("cache", a.cache);
  check.that(a.cache.size(1) > 0, "page_size", "at least 1", a.cache.size(1));
}

void check_args(const PagedIndexerLogitsArgs& a) {
  const Check check("paged_indexer_logits");
  constexpr std::int64_t any = Check::kAny;
  check.tensor("q", a.q, "[batch, s_q, heads, d]", {any, any, any, any},
               {DType::float64, DType::float32, DType::float16, DType::bfloat16, DType::float8_e4m3fn});
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), heads = a.q.size(2);
  const DType wide = a.q.dtype == DType::float64 ? DType::float64 : DType::float32;
  check.unit_last_stride("q", a.q);
  check_cache(check, a);
  check.tensor("weights", a.weights, "[batch, s_q, heads]", {batch, s_q, heads}, {wide});
  check.unit_last_stride("weights", a.weights);
  check.tensor("context_lens", a.context_lens, "[batch, s_q]", {batch, s_q}, {DType::int32});
  check.tensor("block_table", a.block_table, "[batch, max_pages]", {batch, any}, {DType::int32});
  check.unit_last_stride("block_table", a.block_table);
  check.contiguous("logits", a.logits, "[batch, s_q, max_len]", {batch, s_q, any}, {wide});
  check.on_device(a.q.device, {{"cache", a.cache},
                               {"weights", a.weights},
                               {"context_lens", a.context_lens},
                               {"block_table", a.block_table},
                               {"logits", a.logits}});
}

}  // namespace

void paged_indexer_logits(const PagedIndexerLogitsArgs& args, const Launch& launch) {
  check_args(args);
  if (args.logits.numel() == 0) return;
  forward(args, args.q.device, launch);
}

}  // namespace dsm
