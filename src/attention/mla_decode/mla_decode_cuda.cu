// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/gathered_cuda.cuh"
#include "src/attention/mla_decode/mla_decode.h"

namespace dsm {
namespace {

/// The queries of a request share its table, and a tile of keys serves as many of them as a block has rows for.
attention::GatheredAttention problem(const MlaDecodeArgs& a) {
  const std::int64_t s_q = a.q.size(1), h_q = a.q.size(2);
  attention::KeyPool pool;
  pool.data = a.k_cache.as<const std::uint8_t>();
  pool.page_bytes = attention::step_bytes(a.k_cache, 0);
  pool.row_bytes = attention::step_bytes(a.k_cache, 1);
  pool.head_bytes = attention::step_bytes(a.k_cache, 2);
  pool.set_pages(a.k_cache.size(0), a.k_cache.size(1));
  pool.format = attention::row_format(a.k_cache.dtype, a.q.dtype);
  pool.table = true;
  pool.list = a.block_table.as<const std::int32_t>();
  pool.list_request = attention::step(a.block_table, 0);
  pool.listed = a.block_table.size(1) * a.k_cache.size(1);
  pool.lengths = a.cache_seqlens.as<const std::int32_t>();
  return {.dtype = a.q.dtype,
          .requests = a.q.size(0),
          .s_q = s_q,
          .h_q = h_q,
          .h_kv = std::max<std::int64_t>(a.k_cache.size(2), 1),
          .d_qk = a.q.size(3),
          .d_v = a.out.size(3),
          .own_lists = false,
          .causal = a.causal,
          .softmax_scale = a.softmax_scale,
          .batch_invariant = a.batch_invariant,
          .q = a.q.data,
          .q_strides = attention::strides(a.q),
          .out = a.out.data,
          .out_strides = attention::strides(a.out),
          .lse = a.lse.data,
          .lse_strides = {h_q * s_q, 1, s_q},
          .k_scale = a.k_scale.as<const float>(),
          .pools = {pool}};
}

}  // namespace

void mla_decode_cuda(const MlaDecodeArgs& a, const Launch& launch) {
  attention::attend_gathered_cuda("mla_decode", problem(a), launch);
}

std::size_t mla_decode_cuda_workspace(const MlaDecodeArgs& a) { return attention::gathered_workspace(problem(a)); }

}  // namespace dsm
