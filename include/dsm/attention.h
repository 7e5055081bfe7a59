// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

// Conventions of this family. Floating tensors are float64, float32, float16 or bfloat16, all of q's dtype; statistics
// (lse, dlse) are float32, float64 for float64 tensors. Sums and exponentials are formed in the statistics' dtype and
// each result is rounded once. Inputs may have any strides but adjacent elements in the last dimension; outputs are
// contiguous. A causal query i sees the keys j <= i + s_kv - s_q: the last query is aligned with the last key. A query
// without keys has output 0 and lse -inf. What a query may not see (NaN included) never reaches its result.

/// Softmax attention with grouped query heads, over batches of one length or over packed sequences ("varlen"):
///
///   s_ij = softmax_scale · q_i · k_j,   lse_i = log Σ_j exp(s_ij),   out_i = Σ_j exp(s_ij − lse_i) v_j
///
/// Query head h uses key head h / (h_q / h_kv). The score matrix is formed tile by tile, never as a whole.
/// Source: Dao 2023 (arXiv 2307.08691); Milakov & Gimelshein 2018 (arXiv 1805.02867).
struct FlashAttnArgs {
  TensorView q;              ///< [batch, s_q, h_q, d_qk]; varlen [total_q, h_q, d_qk]
  TensorView k;              ///< [batch, s_kv, h_kv, d_qk]; varlen [total_kv, h_kv, d_qk]
  TensorView v;              ///< [batch, s_kv, h_kv, d_v]; varlen [total_kv, h_kv, d_v]
  TensorView cu_seqlens_q;   ///< [batch + 1] int32: sequence b is rows [c[b], c[b+1]); absent: not varlen
  TensorView cu_seqlens_kv;  ///< as cu_seqlens_q; both or neither. Rows outside every sequence count as having no key
  double softmax_scale = 1;
  bool causal = false;
  TensorView out;  ///< out [batch, s_q, h_q, d_v]; varlen [total_q, h_q, d_v]
  TensorView lse;  ///< out [batch, h_q, s_q]; varlen [h_q, total_q]. Natural logarithm
};
DSM_API void flash_attn(const FlashAttnArgs& args, const Launch& launch = {});
DSM_API std::size_t flash_attn_workspace(const FlashAttnArgs& args);

/// Gradients of flash_attn. With p_ij = exp(s_ij − lse_i) and D_i = dout_i · out_i − dlse_i:
///
///   ds_ij = p_ij (dout_i · v_j − D_i)
///   dq_i = softmax_scale Σ_j ds_ij k_j,   dk_j = softmax_scale Σ_i ds_ij q_i,   dv_j = Σ_i p_ij dout_i
///
/// dk and dv add up the query heads of a group in order. Rows outside every sequence get gradient 0.
struct FlashAttnBackwardArgs {
  TensorView dout;  ///< like out
  TensorView dlse;  ///< contiguous, like lse; absent: 0
  TensorView q;     ///< this and the following as in the forward call
  TensorView k;
  TensorView v;
  TensorView out;  ///< contiguous
  TensorView lse;
  TensorView cu_seqlens_q;
  TensorView cu_seqlens_kv;
  double softmax_scale = 1;
  bool causal = false;
  TensorView dq;  ///< out, like q
  TensorView dk;  ///< out, like k
  TensorView dv;  ///< out, like v
};
DSM_API void flash_attn_backward(const FlashAttnBackwardArgs& args, const Launch& launch = {});
DSM_API std::size_t flash_attn_backward_workspace(const FlashAttnBackwardArgs& args);

/// Attention through a low-rank latent space (DMLA), with the projections tied as in multi-head latent attention:
///
///   q' = q wk,   k' = k wk,   v' = v wv
///   s_ij = softmax_scale · q'_i · k'_j,   lse_i = log Σ_j exp(s_ij)
///   latent_i = Σ_j exp(s_ij − lse_i) v'_j,   out_i = latent_i wvᵀ
///
/// With cache_is_latent, k and v hold k' and v' already (a latent cache): wk then projects the queries only (absent: q
/// is q' already) and wv the output only. A causal call needs s_q <= s_kv. On the CPU q', k', v' and the latent output
/// that wv projects are kept unrounded.
struct FlashDmlaArgs {
  TensorView q;   ///< [batch, heads, s_q, d_qk], or [batch, heads, s_q, d_latent] without wk
  TensorView k;   ///< [batch, heads, s_kv, d_qk], or [batch, heads, s_kv, d_latent] when cache_is_latent
  TensorView v;   ///< [batch, heads, s_kv, d_v], or [batch, heads, s_kv, d_latent] when cache_is_latent
  TensorView wk;  ///< [d_qk, d_latent]; may be absent when cache_is_latent
  TensorView wv;  ///< [d_v, d_latent]; may be absent when cache_is_latent
  double softmax_scale = 1;
  bool causal = false;
  bool cache_is_latent = false;
  TensorView out;     ///< out [batch, heads, s_q, d_v]; absent: no output projection. Needs wv
  TensorView latent;  ///< out [batch, heads, s_q, d_latent]
  TensorView lse;     ///< out [batch, heads, s_q], natural logarithm
};
DSM_API void flash_dmla(const FlashDmlaArgs& args, const Launch& launch = {});
DSM_API std::size_t flash_dmla_workspace(const FlashDmlaArgs& args);

/// Gradients of flash_dmla. With dlatent' = dlatent + dout wv, and dq', dk', dv' the gradients of softmax attention
/// over q', k', v' at output gradient dlatent':
///
///   dq = dq' wkᵀ,   dk = dk' wkᵀ,   dv = dv' wvᵀ,   dwk = Σ (qᵀ dq' + kᵀ dk'),   dwv = Σ (doutᵀ latent + vᵀ dv')
///
/// summed over batch and heads in order. With cache_is_latent, dk = dk', dv = dv' and their terms of dwk and dwv fall
/// away; without wk, dq = dq'.
struct FlashDmlaBackwardArgs {
  TensorView dout;     ///< like out; absent: 0. Needs wv
  TensorView dlatent;  ///< like latent; absent: 0
  TensorView dlse;     ///< contiguous, like lse; absent: 0
  TensorView q;        ///< this and the following as in the forward call
  TensorView k;
  TensorView v;
  TensorView wk;
  TensorView wv;
  TensorView latent;  ///< contiguous
  TensorView lse;
  double softmax_scale = 1;
  bool causal = false;
  bool cache_is_latent = false;
  TensorView dq;   ///< out, like q
  TensorView dk;   ///< out, like k
  TensorView dv;   ///< out, like v
  TensorView dwk;  ///< out, like wk, given exactly when wk is
  TensorView dwv;  ///< out, like wv, given exactly when wv is
};
DSM_API void flash_dmla_backward(const FlashDmlaBackwardArgs& args, const Launch& launch = {});
DSM_API std::size_t flash_dmla_backward_workspace(const FlashDmlaBackwardArgs& args);

}  // namespace dsm
