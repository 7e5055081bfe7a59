// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

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
/// are all −inf, has out 0, lse +inf and max_logits −inf. Rows that no list names are never read.
/// Source: DeepSeek-V3.2 report (2025); FlashMLA, flash_mla_sparse_fwd.
struct SparseMlaPrefillArgs {
  TensorView q;            ///< [s_q, h_q, d_qk], h_q a multiple of h_kv
  TensorView kv;           ///< [s_kv, h_kv, d_qk]
  TensorView indices;      ///< [s_q, h_kv, topk] int32, rows of kv, in any order
  TensorView attn_sink;    ///< [h_q] contiguous; absent: −inf
  TensorView topk_length;  ///< [s_q] int32, contiguous: only so many indices of the query count; absent: all
  double softmax_scale = 1;
  TensorView out;         ///< out [s_q, h_q, d_v], d_v <= d_qk; rows and heads any distance apart
  TensorView max_logits;  ///< out [s_q, h_q]
  TensorView lse;         ///< out [s_q, h_q], natural logarithm
  TensorView key_probs;   ///< out [s_q, h_kv, topk], 0 where there is no key; absent: not wanted
};
DSM_API void sparse_mla_prefill(const SparseMlaPrefillArgs& args, const Launch& launch = {});

}  // namespace dsm
