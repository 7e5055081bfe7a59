// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/gathered_cuda.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode.h"

namespace dsm {
namespace {

attention::KeyPool pool_of(const TensorView& cache, const TensorView& indices, const TensorView& length,
                           DType queries) {
  attention::KeyPool pool;
  pool.data = cache.as<const std::uint8_t>();
  pool.page_bytes = attention::step_bytes(cache, 0);
  pool.row_bytes = cache.size(3) * element_size(cache.dtype);
  if (const auto format = kv_format(cache)) {
    pool.format = attention::row_format(*format);
    if (*format == KvFormat::v4_fp8) pool.row_bytes = KvV4Fp8::kDataBytes;
  } else {
    pool.format = attention::row_format(cache.dtype, queries);
  }
  pool.set_pages(cache.size(0), cache.size(1));
  pool.list = indices.as<const std::int32_t>();
  pool.list_request = attention::step(indices, 0);
  pool.list_query = attention::step(indices, 1);
  pool.listed = indices.size(2);
  pool.lengths = length.as<const std::int32_t>();
  return pool;
}

/// The heads of a query share its lists, the second one's keys following the first one's.
attention::GatheredAttention problem(const SparseMlaDecodeArgs& a) {
  const std::int64_t s_q = a.q.size(1), h_q = a.q.size(2);
  return {.dtype = a.q.dtype,
          .requests = a.q.size(0),
          .s_q = s_q,
          .h_q = h_q,
          .h_kv = 1,
          .d_qk = a.q.size(3),
          .d_v = a.out.size(3),
          .own_lists = true,
          .softmax_scale = a.softmax_scale,
          .batch_invariant = a.batch_invariant,
          .q = a.q.data,
          .q_strides = attention::strides(a.q),
          .out = a.out.data,
          .out_strides = attention::strides(a.out),
          .lse = a.lse.data,
          .lse_strides = {h_q * s_q, 1, s_q},
          .attn_sink = a.attn_sink.data,
          .pool_count = a.extra_k_cache ? 2 : 1,
          .pools = {pool_of(a.k_cache, a.indices, a.topk_length, a.q.dtype),
                    a.extra_k_cache ? pool_of(a.extra_k_cache, a.extra_indices, a.extra_topk_length, a.q.dtype)
                                    : attention::KeyPool()}};
}

}  // namespace

void sparse_mla_decode_cuda(const SparseMlaDecodeArgs& a, const Launch& launch) {
  attention::attend_gathered_cuda("sparse_mla_decode", problem(a), launch);
}

std::size_t sparse_mla_decode_cuda_workspace(const SparseMlaDecodeArgs& a) {
  return attention::gathered_workspace(problem(a));
}

}  // namespace dsm
