// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/sparse_mla_decode/sparse_mla_decode.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "src/attention/key_count.h"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_prompt.h"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.h"
#include "src/core/checks.h"
#include "src/core/kv_cache.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<SparseMlaDecodeArgs> decode("attention", "sparse_mla_decode",
                                           {{"prefill", DeviceType::cuda, DSM_CUDA_ROW(sparse_mla_decode_prompt),
                                             DSM_CUDA_ROW(sparse_mla_decode_prompt_refusal)},
                                            {"sm90", DeviceType::cuda, DSM_CUDA_ROW(sparse_mla_decode_sm90),
                                             DSM_CUDA_ROW(sparse_mla_decode_sm90_refusal)},
                                            {"cuda", DeviceType::cuda, DSM_CUDA_ROW(sparse_mla_decode_cuda)},
                                            {"cpu", DeviceType::cpu, sparse_mla_decode_cpu}});

/// The arguments of one of the two caches.
struct Pool {
  const char *cache_name, *indices_name, *length_name;
  const TensorView &cache, &indices, &length;
};

void check_pool(const Check& check, const SparseMlaDecodeArgs& a, const Pool& pool,
                std::initializer_list<KvFormat> formats) {
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), d_qk = a.q.size(3);
  check_kv_cache(check, pool.cache_name, pool.cache, formats);
  check.that(pool.cache.dtype != DType::float64 || a.q.dtype == DType::float64, pool.cache_name,
             std::string("quantised, float32, float16 or bfloat16 beside q in ") + name(a.q.dtype),
             name(pool.cache.dtype));
  check.that(kv_width(pool.cache) == d_qk, pool.cache_name, "of rows of d_qk = " + std::to_string(d_qk) + " values",
             std::to_string(kv_width(pool.cache)) + " values in " + describe(pool.cache));
  check.tensor(pool.indices_name, pool.indices, "[batch, s_q, topk]", {batch, s_q, Check::kAny}, {DType::int32});
  check.unit_last_stride(pool.indices_name, pool.indices);
  attention::check_key_count(check, pool.indices_name, pool.indices.size(2));
  if (pool.length) check.contiguous(pool.length_name, pool.length, "[batch]", {batch}, {DType::int32});
  check.on_device(a.q.device,
                  {{pool.cache_name, pool.cache}, {pool.indices_name, pool.indices}, {pool.length_name, pool.length}});
}

void check_args(const SparseMlaDecodeArgs& a) {
  constexpr std::int64_t any = Check::kAny;
  const Check check("sparse_mla_decode");
  check.tensor("q", a.q, "[batch, s_q, h_q, d_qk]", {any, any, any, any}, kFloating);
  check.unit_last_stride("q", a.q);
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  const DType statistics = a.q.dtype == DType::float64 ? DType::float64 : DType::float32;
  check_pool(check, a, {"k_cache", "indices", "topk_length", a.k_cache, a.indices, a.topk_length},
             {KvFormat::v32_fp8, KvFormat::v32_nvfp4, KvFormat::v4_fp8, KvFormat::v41_fp8});
  if (a.extra_k_cache) {
    check_pool(
        check, a,
        {"extra_k_cache", "extra_indices", "extra_topk_length", a.extra_k_cache, a.extra_indices, a.extra_topk_length},
        {KvFormat::v32_fp8, KvFormat::v32_nvfp4, KvFormat::v4_fp8, KvFormat::v41_fp8, KvFormat::v41_fp4});
  } else {
    check.that(!a.extra_indices, "extra_indices", "given exactly when extra_k_cache is", describe(a.extra_indices));
    check.that(!a.extra_topk_length, "extra_topk_length", "absent without extra_k_cache",
               describe(a.extra_topk_length));
  }
  if (a.attn_sink) check.contiguous("attn_sink", a.attn_sink, "[h_q]", {h_q}, {statistics});
  check.that(std::isfinite(a.softmax_scale), "softmax_scale", "finite", std::to_string(a.softmax_scale));
  check.tensor("out", a.out, "[batch, s_q, h_q, d_v]", {batch, s_q, h_q, any}, {a.q.dtype});
  check.unit_last_stride("out", a.out);
  check.that(a.out.size(3) <= d_qk, "d_v", "at most d_qk = " + std::to_string(d_qk), a.out.size(3));
  check.contiguous("lse", a.lse, "[batch, h_q, s_q]", {batch, h_q, s_q}, {statistics});
  check.on_device(a.q.device, {{"attn_sink", a.attn_sink}, {"out", a.out}, {"lse", a.lse}});
}

}  // namespace

void sparse_mla_decode(const SparseMlaDecodeArgs& args, const Launch& launch) {
  check_args(args);
  if (args.lse.numel() == 0) return;
  Check("sparse_mla_decode").workspace(launch, sparse_mla_decode_workspace(args));
  decode(args, args.q.device, launch);
}

std::size_t sparse_mla_decode_workspace(const SparseMlaDecodeArgs& a) {
  if (a.q.device.type == DeviceType::cpu) return 0;
#if DSM_WITH_CUDA
  if (decode.allows("prefill") && sparse_mla_decode_prompt_refusal(a).empty())
    return sparse_mla_decode_prompt_workspace(a);
  if (decode.allows("sm90") && sparse_mla_decode_sm90_refusal(a).empty()) return sparse_mla_decode_sm90_workspace(a);
  return sparse_mla_decode_cuda_workspace(a);
#else
  return 0;
#endif
}

}  // namespace dsm
