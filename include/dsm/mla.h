// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

// Multi-head latent attention over a paged cache: one row per token serves as key, and its first d_v elements as value.
// lse is the natural logarithm, float32 (float64 for float64 tensors), +inf for a query without keys, whose output is
// 0. A score of −inf is no key; one of +inf, or NaN, makes its query's output and lse NaN. Arithmetic is in lse's
// dtype, and each result is rounded once. Tensor cores take 16-bit operands: GPUs round the probabilities of 16-bit
// types to q's dtype (or to 11 bits) where more than 32 query rows share a key head or rows are quantised, Hopper
// always. Hopper also rounds the values of quantised rows so, and finite scores must be below 2^24 in magnitude there.
//
// GPUs share the keys of a call between multiprocessors, which decides the order of sums. With batch_invariant the
// requests are cut by their own lengths alone: the bits of a request are the same in any batch of up to 4096, at any
// place in it, with any number of pages or of other requests, as long as one implementation takes the calls. Few
// requests take longer then, and the workspace grows with the batch. On the CPU they always are the same.

/// Attention of new tokens over a paged cache, with grouped query heads:
///
///   s_ij = softmax_scale · q_i · k_j,   lse_i = log Σ_j exp(s_ij),   out_i = Σ_j exp(s_ij − lse_i) k_j[:d_v]
///
/// Key j < cache_seqlens[b] of request b is row j mod page_size of page block_table[b, j / page_size]; nothing of the
/// table or of the cache beyond the length is read. Query head h uses key head h / (h_q / h_kv). A causal query i sees
/// the keys j <= i + cache_seqlens[b] − s_q: the last query is aligned with the last key.
///
/// A plain cache may have another dtype than q. In an FP8 cache the elements are E4M3 codes and a key is k_scale times
/// them.
/// Errors: on the CPU, a length beyond the table or a page within the length that does not exist. On a GPU the nearest
/// possible length counts, and such a page makes its request's result arbitrary; nothing outside the cache is read.
/// Source: DeepSeek-V2 (arXiv 2405.04434); the arguments of FlashMLA.
struct MlaDecodeArgs {
  TensorView q;  ///< [batch, s_q, h_q, d_qk] float64|float32|float16|bfloat16, elements adjacent
  /// [pages, page_size, h_kv, d_qk] float32|float16|bfloat16; beside a float64 q float64, too; beside any other FP8,
  /// too: float8_e4m3fn|uint8|int8. Pages, rows and heads any distance apart, elements adjacent.
  TensorView k_cache;
  TensorView block_table;    ///< [batch, max_pages] int32 of up to 2^30 keys, requests any distance apart
  TensorView cache_seqlens;  ///< [batch] int32, keys of each request, 0 to max_pages · page_size
  TensorView k_scale;        ///< [] or [1] float32; absent: 1. FP8 caches only
  double softmax_scale = 1;
  bool causal = false;
  bool batch_invariant = false;
  TensorView out;  ///< out [batch, s_q, h_q, d_v] q's dtype, d_v <= d_qk, rows and heads any distance apart
  TensorView lse;  ///< out [batch, h_q, s_q] contiguous
};
DSM_API void mla_decode(const MlaDecodeArgs& args, const Launch& launch = {});
DSM_API std::size_t mla_decode_workspace(const MlaDecodeArgs& args);

/// Attention of each query over its own lists of cached rows, of one cache or of two in one softmax (DeepSeek-V3.2:
/// the rows that the indexer chose; DeepSeek-V4: the sliding window and compressed entries):
///
///   s_hj = softmax_scale · q_h · k_j,   lse_h = log Σ_j exp(s_hj),   out_h = Σ_j p_hj k_j[:d_v]
///   p_hj = exp(s_hj) / (Σ_j exp(s_hj) + exp(attn_sink_h))
///
/// Caches are plain or quantised (dsm/kv_cache.h): a quantised row stands for its float32 values. Index = page ·
/// page_size + entry. An index below 0 or beyond the last row is no key; one that is listed twice counts twice. Rows
/// that no list names within its length may be read, but have no effect. The sink is in no lse; −inf is none, +inf
/// gives output 0. Source: DeepSeek-V3.2 report (2025), DeepSeek-V4 reference code; the arguments of FlashMLA.
struct SparseMlaDecodeArgs {
  TensorView q;  ///< [batch, s_q, h_q, d_qk] float64|float32|float16|bfloat16, elements adjacent
  /// [pages, page_size, 1, d_qk] float32|float16|bfloat16, beside a float64 q float64, too; or [pages, page_size, 1,
  /// bytes] uint8|int8|float8_e4m3fn of a format with d_qk values in 656, 352, 584 or 528 bytes. Pages any distance
  /// apart.
  TensorView k_cache;
  TensorView indices;            ///< [batch, s_q, topk <= 2^30] int32, rows of k_cache in any order, elements adjacent
  TensorView topk_length;        ///< [batch] int32: only so many indices of each query count; absent: all
  TensorView extra_k_cache;      ///< the second cache, as k_cache, or with 288 bytes; absent: none
  TensorView extra_indices;      ///< [batch, s_q, extra_topk] likewise, given exactly when extra_k_cache is
  TensorView extra_topk_length;  ///< as topk_length, for extra_indices
  TensorView attn_sink;          ///< [h_q] lse's dtype, ±inf allowed; absent: −inf
  double softmax_scale = 1;
  bool batch_invariant = false;
  TensorView out;  ///< out [batch, s_q, h_q, d_v] q's dtype, d_v <= d_qk, rows and heads any distance apart
  TensorView lse;  ///< out [batch, h_q, s_q] contiguous
};
DSM_API void sparse_mla_decode(const SparseMlaDecodeArgs& args, const Launch& launch = {});
DSM_API std::size_t sparse_mla_decode_workspace(const SparseMlaDecodeArgs& args);

/// The attention over a set of keys from the attentions over disjoint parts of it (pages of several devices, or two
/// caches):
///
///   lse = log Σ_p exp(lses_p),   out = Σ_p exp(lses_p − lse) outs_p · sigmoid(lse − attn_sink)
///
/// The sink is one more score per head with a zero value; it is not in lse. A part with an lse of ±inf has no key for
/// that query: its output is not read, and may be NaN. NaN in an lse stays.
struct MergeAttentionStatesArgs {
  TensorView outs;       ///< [parts, batch, s_q, h_q, d_v] float64|float32|float16|bfloat16, elements adjacent
  TensorView lses;       ///< [parts, batch, h_q, s_q] float32 (float64 for float64 outs), any strides
  TensorView attn_sink;  ///< [h_q] lses' dtype; ±inf allowed; absent: -inf, i.e. none
  TensorView out;        ///< out [batch, s_q, h_q, d_v] outs' dtype, contiguous
  TensorView lse;        ///< out [batch, h_q, s_q] lses' dtype, contiguous; +inf where no part has a key
};
DSM_API void merge_attention_states(const MergeAttentionStatesArgs& args, const Launch& launch = {});

}  // namespace dsm
