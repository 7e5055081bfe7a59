// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

// The indexer of DeepSeek sparse attention: a small scorer that chooses, for every query, the keys to attend to.
// Queries and keys are rotated and quantised (hadamard_quantize), scored (indexer_logits, paged_indexer_logits), the
// best keys selected (indexer_topk); in training the scorer learns to predict the attention (indexer_kl_loss).
// "wide" below is float32, or float64 where the operands are float64.
namespace dsm {

/// What hadamard_quantize makes of the rotated vectors.
enum class IndexerFormat : std::uint8_t {
  none,  ///< left as they are
  fp4,   ///< E2M1 with a power-of-two scale per 32 values, decoded again: the values that quantised storage would give
  fp8,   ///< E4M3 with one power-of-two scale per vector
};

/// Rotates vectors by a Hadamard matrix, which spreads outliers over all dimensions, and quantises them:
///
///   y = (x · H) · d^-0.5,   H[i][j] = (−1)^popcount(i & j)      (Sylvester's order, d a power of two; rotate only)
///   fp4:  s = 2^ceil(log2(max(amax, 6·2^-126) · float(1/6))) over each 32 values,   y ← e2m1(y / s) · s
///   fp8:  s = 2^ceil(log2(max(amax, 1e-4) · float(1/448))) over the vector,         y ← e4m3(y / s), scale ← s
///
/// in float32 (float64 for float64 x); y is rounded to x's dtype before it is quantised. Ties go to the even code. A
/// NaN or infinity makes its whole block NaN. The rotation is its own inverse and its own derivative's transpose: the
/// gradient without quantisation is hadamard_quantize of the output's gradient.
/// Source: DeepSeek-V4 and V3.2 reference code.
struct HadamardQuantizeArgs {
  TensorView x;        ///< [rows, d] float64|float32|float16|bfloat16, rows any distance apart; quantised: the exponent
                       ///< range of float32, i.e. float32|bfloat16, and for fp4 d a multiple of 32
  bool rotate = true;  ///< false: quantise only
  IndexerFormat format = IndexerFormat::none;
  TensorView y;      ///< out [rows, d] contiguous, x's dtype; fp8: float8_e4m3fn
  TensorView scale;  ///< out [rows] float32, exactly for fp8
};
DSM_API void hadamard_quantize(const HadamardQuantizeArgs& args, const Launch& launch = {});

/// Scores of every key for every query:
///
///   logits[i][j] = k_scale[j] · Σ_h weights[i][h] · max(0, q[i][h] · k[j])     for starts[i] <= j < ends[i],  else −∞
///
/// in wide. Ranges are cut to [0, s_kv); what stands in keys outside of a query's range never reaches its logits. FP8
/// queries have their scales folded into the weights. No [s_q, heads, s_kv] tensor is made.
/// Source: DeepSeek-V3.2 report (lightning indexer); DeepSeek-V4 reference code with float32 scores.
struct IndexerLogitsArgs {
  TensorView q;        ///< [s_q, heads, d] float64|float32|float16|bfloat16|float8_e4m3fn, unit last stride
  TensorView k;        ///< [s_kv, d] q's dtype or, unless q is float64, float8_e4m3fn; unit last stride
  TensorView k_scale;  ///< [s_kv] float32, only with FP8 keys; absent: 1
  TensorView weights;  ///< [s_q, heads] wide, unit last stride
  TensorView starts;   ///< [s_q] int32, first key of each query; absent: 0
  TensorView ends;     ///< [s_q] int32, one behind its last key; absent: s_kv
  TensorView logits;   ///< out [s_q, s_kv] wide, contiguous
};
DSM_API void indexer_logits(const IndexerLogitsArgs& args, const Launch& launch = {});

/// Gradients of indexer_logits for operands that are not FP8. With g[i][j] = dlogits[i][j] inside the ranges, else 0,
/// and t = q[i][h] · k[j]:
///
///   dweights[i][h] = Σ_j g[i][j] · max(0, t),   ds[i][h][j] = t > 0 ? g[i][j] · weights[i][h] : 0
///   dq[i][h] = Σ_j ds[i][h][j] · k[j],          dk[j] = Σ_ih ds[i][h][j] · q[i][h]
///
/// in wide, rounded once; sums in a fixed order.
struct IndexerLogitsBackwardArgs {
  TensorView dlogits;           ///< [s_q, s_kv] wide, unit last stride
  TensorView q, k, weights;     ///< as in the forward call; q float64|float32|float16|bfloat16, k likewise
  TensorView starts, ends;      ///< as in the forward call
  TensorView dq, dk, dweights;  ///< out, contiguous, of the shape and dtype of q, k and weights
};
DSM_API void indexer_logits_backward(const IndexerLogitsBackwardArgs& args, const Launch& launch = {});

/// indexer_logits over a paged cache of keys: key j of a request stands in page block_table[b][j / page_size], entry
/// j % page_size. Query i of request b sees its first context_lens[b][i] keys (cut to [0, max_len) and to what the
/// block table covers); the other logits, and those of keys whose page does not exist, are −∞. Nothing beyond the
/// context is read, neither in the table nor in the cache.
///
/// A float cache is [pages, page_size, 1, d]. An FP8 cache is [pages, page_size, 1, d + 4] bytes, which is a nominal
/// shape: a page holds first page_size · d bytes of E4M3, then page_size float32 scales; pages lie any number of bytes
/// apart. Source: DeepGEMM's and vLLM's layout.
struct PagedIndexerLogitsArgs {
  TensorView q;             ///< [batch, s_q, heads, d] as in indexer_logits
  TensorView cache;         ///< see above: q's dtype or, unless q is float64, uint8|int8|float8_e4m3fn
  TensorView weights;       ///< [batch, s_q, heads] wide, unit last stride
  TensorView context_lens;  ///< [batch, s_q] int32, any strides
  TensorView block_table;   ///< [batch, max_pages] int32, unit last stride
  TensorView logits;        ///< out [batch, s_q, max_len] wide, contiguous
};
DSM_API void paged_indexer_logits(const PagedIndexerLogitsArgs& args, const Launch& launch = {});

/// The topk largest logits of each row among starts[i] <= j < ends[i]; of equal ones those of smaller index. −∞ and NaN
/// are never selected. The indices come in ascending order, followed by −1 where fewer can be selected.
struct IndexerTopkArgs {
  TensorView logits;   ///< [rows, n] float32, unit last stride, n < 2^31
  TensorView starts;   ///< [rows] int32; absent: 0
  TensorView ends;     ///< [rows] int32; absent: n. Ranges are cut to [0, n).
  TensorView indices;  ///< out [rows, topk] int32, contiguous
};
DSM_API void indexer_topk(const IndexerTopkArgs& args, const Launch& launch = {});

/// What the indexer is trained by: how far the softmax of its logits is from the attention it should predict, over the
/// same keys. With p = target / Σ target:
///
///   loss[i] = Σ_s p[i][s] · (log p[i][s] − log softmax(x[i])[s]),    x[i][s] = logits[i][indices[i][s]]
///
/// over the slots s of row i that have a key: an index in [0, n) and a logit above −∞. 0 where no slot has, or the
/// targets add up to 0. 0 · log 0 = 0. What stands in slots without a key is never used; a NaN logit of a key shows.
/// Source: DeepSeek-V3.2 report: target = attention probabilities summed over the heads.
struct IndexerKlLossArgs {
  TensorView logits;   ///< [rows, n] float64|float32, unit last stride
  TensorView target;   ///< [rows, slots] logits' dtype, >= 0, unit last stride
  TensorView indices;  ///< [rows, slots] int32, unit last stride; absent: slot s is key s and slots = n
  TensorView loss;     ///< out [rows] logits' dtype
};
DSM_API void indexer_kl_loss(const IndexerKlLossArgs& args, const Launch& launch = {});

/// dlogits[i][j] = dloss[i] · Σ_{s: indices[i][s] = j} (softmax(x[i])[s] − p[i][s]); 0 for all other keys. The target
/// has no gradient.
struct IndexerKlLossBackwardArgs {
  TensorView dloss;                    ///< [rows] logits' dtype
  TensorView logits, target, indices;  ///< as in the forward call
  TensorView dlogits;                  ///< out [rows, n] logits' dtype, contiguous
};
DSM_API void indexer_kl_loss_backward(const IndexerKlLossBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
