// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/mla_decode/mla_decode.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "src/attention/key_count.h"
#include "src/attention/mla_decode/mla_decode_sm90.h"
#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<MlaDecodeArgs> decode("attention", "mla_decode",
                                     {{"sm90", DeviceType::cuda, DSM_CUDA_ROW(mla_decode_sm90),
                                       DSM_CUDA_ROW(mla_decode_sm90_refusal)},
                                      {"cuda", DeviceType::cuda, DSM_CUDA_ROW(mla_decode_cuda)},
                                      {"cpu", DeviceType::cpu, mla_decode_cpu}});

/// The dtypes of a cache whose elements float32 holds.
constexpr std::initializer_list<DType> kPlainOrFp8 = {DType::float32,       DType::float16, DType::bfloat16,
                                                      DType::float8_e4m3fn, DType::uint8,   DType::int8};

/// Lengths and the pages within them. Their contents can be read here on the CPU only.
void check_pages(const Check& check, const MlaDecodeArgs& a) {
  const auto* seqlens = a.cache_seqlens.as<const std::int32_t>();
  const std::int64_t pages = a.k_cache.size(0), page_size = a.k_cache.size(1), max_pages = a.block_table.size(1);
  const std::string lengths = "between 0 and max_pages · page_size = " + std::to_string(max_pages * page_size);
  const std::string ids = "a page between 0 and " + std::to_string(pages - 1) + " within cache_seqlens";
  for (std::int64_t b = 0; b < a.q.size(0); ++b) {
    const std::int64_t keys = seqlens[b];
    check.that(keys >= 0 && keys <= max_pages * page_size, "cache_seqlens", lengths,
               std::to_string(keys) + " for request " + std::to_string(b));
    const auto* table = a.block_table.as<const std::int32_t>() + b * a.block_table.stride[0];
    for (std::int64_t page = 0; page * page_size < keys; ++page) {
      if (table[page] < 0 || table[page] >= pages) {
        check.fail("block_table", ids,
                   std::to_string(table[page]) + " at [" + std::to_string(b) + ", " + std::to_string(page) + "]");
      }
    }
  }
}

void check_args(const MlaDecodeArgs& a) {
  constexpr std::int64_t any = Check::kAny;
  const Check check("mla_decode");
  check.tensor("q", a.q, "[batch, s_q, h_q, d_qk]", {any, any, any, any}, kFloating);
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  const Check::DTypes dtypes = a.q.dtype == DType::float64 ? kFloating : kPlainOrFp8;
  check.tensor("k_cache", a.k_cache, "[pages, page_size, h_kv, d_qk]", {any, any, any, d_qk}, dtypes);
  check.that(a.k_cache.size(1) > 0, "page_size", "at least 1", a.k_cache.size(1));
  const std::int64_t h_kv = a.k_cache.size(2);
  check.that(h_kv > 0 && h_q % h_kv == 0, "h_q", "a multiple of h_kv = " + std::to_string(h_kv), h_q);
  check.unit_last_stride("q", a.q);
  check.unit_last_stride("k_cache", a.k_cache);
  check.tensor("block_table", a.block_table, "[batch, max_pages]", {batch, any}, {DType::int32});
  check.unit_last_stride("block_table", a.block_table);
  attention::check_key_count(check, "block_table", a.block_table.size(1) * a.k_cache.size(1));
  check.contiguous("cache_seqlens", a.cache_seqlens, "[batch]", {batch}, {DType::int32});
  if (a.k_scale) {
    check.that(element_size(a.k_cache.dtype) == 1, "k_scale", "absent without an FP8 cache", describe(a.k_scale));
    check.that(a.k_scale.numel() == 1 && a.k_scale.rank <= 1 && a.k_scale.dtype == DType::float32, "k_scale",
               "[] or [1] float32", describe(a.k_scale));
  }
  check.that(std::isfinite(a.softmax_scale), "softmax_scale", "finite", std::to_string(a.softmax_scale));
  check.tensor("out", a.out, "[batch, s_q, h_q, d_v]", {batch, s_q, h_q, any}, {a.q.dtype});
  check.unit_last_stride("out", a.out);
  check.that(a.out.size(3) <= d_qk, "d_v", "at most d_qk = " + std::to_string(d_qk), a.out.size(3));
  check.contiguous("lse", a.lse, "[batch, h_q, s_q]", {batch, h_q, s_q},
                   {a.q.dtype == DType::float64 ? DType::float64 : DType::float32});
  check.on_device(a.q.device, {{"k_cache", a.k_cache},
                               {"block_table", a.block_table},
                               {"cache_seqlens", a.cache_seqlens},
                               {"k_scale", a.k_scale},
                               {"out", a.out},
                               {"lse", a.lse}});
  if (a.q.device.type == DeviceType::cpu) check_pages(check, a);
}

}  // namespace

void mla_decode(const MlaDecodeArgs& args, const Launch& launch) {
  check_args(args);
  if (args.lse.numel() == 0) return;
  Check("mla_decode").workspace(launch, mla_decode_workspace(args));
  decode(args, args.q.device, launch);
}

std::size_t mla_decode_workspace(const MlaDecodeArgs& a) {
  if (a.q.device.type == DeviceType::cpu) return 0;
#if DSM_WITH_CUDA
  if (decode.allows("sm90") && mla_decode_sm90_refusal(a).empty()) return mla_decode_sm90_workspace(a);
  return mla_decode_cuda_workspace(a);
#else
  return 0;
#endif
}

}  // namespace dsm
