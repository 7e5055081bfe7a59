// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/gathered_cuda.cuh"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill.h"
#include "src/cuda/launch/launch.h"

namespace dsm {
namespace {

/// Each query counts as a request of one position.
attention::GatheredAttention problem(const SparseMlaPrefillArgs& a) {
  const std::int64_t h_q = a.q.size(1);
  attention::KeyPool pool;
  pool.data = a.kv.as<const std::uint8_t>();
  pool.row_bytes = attention::step_bytes(a.kv, 0);
  pool.head_bytes = attention::step_bytes(a.kv, 1);
  pool.set_pages(a.kv.size(0) > 0, a.kv.size(0));
  pool.list = a.indices.as<const std::int32_t>();
  pool.list_request = attention::step(a.indices, 0);
  pool.list_head = attention::step(a.indices, 1);
  pool.listed = a.indices.size(2);
  pool.lengths = a.topk_length.as<const std::int32_t>();
  const auto of_query = [](const TensorView& tensor) {
    return attention::Strides{attention::step(tensor, 0), 0, attention::step(tensor, 1)};
  };
  return {.dtype = a.q.dtype,
          .requests = a.q.size(0),
          .s_q = 1,
          .h_q = h_q,
          .h_kv = std::max<std::int64_t>(a.kv.size(1), 1),
          .d_qk = a.q.size(2),
          .d_v = a.out.size(2),
          .own_lists = true,
          .softmax_scale = a.softmax_scale,
          .q = a.q.data,
          .q_strides = of_query(a.q),
          .out = a.out.data,
          .out_strides = of_query(a.out),
          .lse = a.lse.data,
          .max_logits = a.max_logits.data,
          .lse_strides = of_query(a.lse),
          .attn_sink = a.attn_sink.data,
          .key_probs = a.key_probs.data,
          .pools = {pool}};
}

}  // namespace

void sparse_mla_prefill_cuda(const SparseMlaPrefillArgs& a, const Launch& launch) {
  if (a.q.size(1) == 0) {
    if (a.key_probs)
      cuda::check(cudaMemsetAsync(a.key_probs.data, 0, a.key_probs.numel() * element_size(a.key_probs.dtype),
                                  static_cast<cudaStream_t>(launch.stream)),
                  "sparse_mla_prefill");
    return;
  }
  attention::attend_gathered_cuda("sparse_mla_prefill", problem(a), launch);
}

std::size_t sparse_mla_prefill_cuda_workspace(const SparseMlaPrefillArgs& a) {
  return attention::gathered_workspace(problem(a));
}

}  // namespace dsm
