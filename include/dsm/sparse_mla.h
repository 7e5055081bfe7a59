// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

// Conventions. Floating tensors are float64, float32, float16 or bfloat16, all of q's dtype; statistics (max_logits,
// lse, dlse, attn_sink, key_probs) are float32, float64 for float64 tensors. Sums and exponentials are formed in the
// statistics' dtype and each result is rounded once. Unless said otherwise, rows and heads of an input may be any
// distance apart, the elements of its last dimension are adjacent, and outputs are contiguous.

/// Attention of every query over its own list of keys, each row of kv being a key and, in its first d_v columns, a
/// value (latent attention in absorbed form; the key and value rows of DeepSeek-V4):
///
///   s_hj = softmax_scale · q_h · kv_j,   max_logits_h = max_j s_hj,   lse_h = log Σ_j exp(s_hj)
///   p_hj = exp(s_hj) / (Σ_j exp(s_hj) + exp(attn_sink_h)),   out_h = Σ_j p_hj kv_j[: d_v]
///   key_probs_j = Σ_h p_hj, over the query heads of j's key head
///
/// Query head h uses key head h / (h_q / h_kv). An index below 0 or from s_kv on is no key; one that is listed twice
/// counts twice. The sink is in no statistic; −inf is none, +inf gives output 0. A query without a key, or whose scores
/// are all −inf, has out 0, lse +inf and max_logits −inf; one with a score of +inf or NaN has out and lse NaN. Rows
/// that no list names are never read. GPUs round the probabilities of 16-bit types to the inputs' dtype before they
/// weigh the values where more than 32 query heads share a key head, Hopper always; there finite scores must be below
/// 2^24 in magnitude.
/// Source: DeepSeek-V3.2 report (2025); FlashMLA, flash_mla_sparse_fwd.
struct SparseMlaPrefillArgs {
  TensorView q;            ///< [s_q, h_q, d_qk], h_q a multiple of h_kv
  TensorView kv;           ///< [s_kv, h_kv, d_qk]
  TensorView indices;      ///< [s_q, h_kv, topk <= 2^30] int32, rows of kv, in any order
  TensorView attn_sink;    ///< [h_q] contiguous; absent: −inf
  TensorView topk_length;  ///< [s_q] int32, contiguous: only so many indices of the query count; absent: all
  double softmax_scale = 1;
  TensorView out;         ///< out [s_q, h_q, d_v], d_v <= d_qk; rows and heads any distance apart
  TensorView max_logits;  ///< out [s_q, h_q], contiguous; absent: not wanted
  TensorView lse;         ///< out [s_q, h_q], natural logarithm; without max_logits any distances apart
  TensorView key_probs;   ///< out [s_q, h_kv, topk], 0 where there is no key; absent: not wanted
};
DSM_API void sparse_mla_prefill(const SparseMlaPrefillArgs& args, const Launch& launch = {});
DSM_API std::size_t sparse_mla_prefill_workspace(const SparseMlaPrefillArgs& args);

/// Gradients of sparse_mla_prefill. With w_hj = exp(s_hj − lse_h), f_h = exp(lse_h) / (exp(lse_h) + exp(attn_sink_h))
/// and D_h = dout_h · out_h:
///
///   ds_hj = w_hj (f_h (dout_h · kv_j[: d_v] − D_h) + dlse_h)
///   dq_h = softmax_scale Σ_j ds_hj kv_j,   dattn_sink_h = −Σ_queries (1 − f_h) D_h
///   dkv_j = Σ_queries Σ_h (softmax_scale ds_hj q_h + w_hj f_h [dout_h, 0])
///
/// Sums over queries are taken in their order, for any number of threads. Rows that no list names get gradient 0.
struct SparseMlaBackwardArgs {
  TensorView dout;  ///< [s_q, h_q, d_v]
  TensorView dlse;  ///< [s_q, h_q] contiguous; absent: 0
  TensorView q;     ///< this and the following as in the forward call
  TensorView kv;
  TensorView indices;
  TensorView attn_sink;
  TensorView topk_length;
  TensorView out;
  TensorView lse;  ///< contiguous
  double softmax_scale = 1;
  TensorView dq;          ///< out, like q
  TensorView dkv;         ///< out, like kv
  TensorView dattn_sink;  ///< out, like attn_sink; absent exactly when that is
};
DSM_API void sparse_mla_backward(const SparseMlaBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
