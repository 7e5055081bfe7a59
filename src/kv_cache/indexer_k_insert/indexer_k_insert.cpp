// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/kv_cache/indexer_k_insert/indexer_k_insert.h"

#include "src/core/kv_cache.h"
#include "src/core/registry.h"
#include "src/kv_cache/placements.h"

namespace dsm {
namespace {

Reason fits_cuda(const IndexerKInsertArgs& a) { return too_many_for_cuda(a.slots); }

const Operator<IndexerKInsertArgs> insert("kv_cache", "indexer_k_insert",
                                          {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(indexer_k_insert_cuda), fits_cuda},
                                           {"cpu", DeviceType::cpu, indexer_k_insert_cpu}});

void check_args(const IndexerKInsertArgs& a) {
  const Check check("indexer_k_insert");
  check.tensor("k", a.k, "[tokens, d]", {Check::kAny, Check::kAny}, kFloating);
  const std::int64_t tokens = a.k.size(0), d = a.k.size(1);
  check.unit_last_stride("k", a.k);
  check.contiguous("slots", a.slots, "[tokens]", {tokens}, {DType::int64});
  check.tensor("cache", a.cache, "[pages, page_size, 1, d + 4]", {Check::kAny, Check::kAny, 1, d + 4}, kByteTypes);
  check_pages(check, "cache", a.cache);
  check.on_device(a.k.device, {{"slots", a.slots}, {"cache", a.cache}});
}

}  // namespace

void indexer_k_insert(const IndexerKInsertArgs& args, const Launch& launch) {
  check_args(args);
  Check("indexer_k_insert").workspace(launch, indexer_k_insert_workspace(args));
  if (args.slots.numel() == 0 || args.cache.numel() == 0) return;
  insert(args, args.k.device, launch);
}

std::size_t indexer_k_insert_workspace(const IndexerKInsertArgs& args) {
  return placements_workspace(args.slots, args.cache);
}

}  // namespace dsm
