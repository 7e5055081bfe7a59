// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

/// Root-mean-square normalisation over the last dimension:
///
///   rstd = 1 / sqrt(mean(x²) + eps),   y = (x · rstd) · weight
///
/// computed in float32 (float64 for float64 tensors) and rounded once to y's dtype, in this order of products.
/// Source: Zhang & Sennrich 2019 (arXiv 1910.07467); DeepSeek-V4 reference code.
struct RmsNormArgs {
  TensorView x;       ///< [rows, hidden] float64|float32|float16|bfloat16, rows any distance apart
  TensorView weight;  ///< [hidden] x's dtype or float32; absent: 1
  double eps = 1e-6;  ///< added to the mean square, >= 0
  TensorView y;       ///< out [rows, hidden] x's dtype, contiguous
  TensorView rstd;    ///< out [rows] float32 (float64 for float64 x), for the backward pass
};
DSM_API void rms_norm(const RmsNormArgs& args, const Launch& launch = {});

/// Gradients of rms_norm. With h = dy · weight and n = hidden:
///
///   dx = rstd · (h − x · rstd² · Σ(h · x) / n),   dweight = Σ_rows dy · x · rstd
///
/// dweight is summed over the rows in a fixed order.
struct RmsNormBackwardArgs {
  TensorView dy;       ///< [rows, hidden] x's dtype, rows any distance apart
  TensorView x;        ///< as in the forward call
  TensorView weight;   ///< as in the forward call
  TensorView rstd;     ///< [rows] as returned by the forward call
  TensorView dx;       ///< out [rows, hidden] x's dtype, contiguous
  TensorView dweight;  ///< out [hidden] weight's dtype; absent exactly when weight is
};
DSM_API void rms_norm_backward(const RmsNormBackwardArgs& args, const Launch& launch = {});
DSM_API std::size_t rms_norm_backward_workspace(const RmsNormBackwardArgs& args);

/// Rotary position embedding of the last d_rope = 2 · pairs dimensions of each head; the others are copied (to rotate
/// others, pass a view of them as x and y):
///
///   angle = float(position) · inv_freq[i],   (a, b) → (a · cos − b · sin, a · sin + b · cos)
///
/// for pair i, where (a, b) are the elements (2i, 2i + 1) of the rotated part when interleaved, (i, pairs + i)
/// otherwise. The angle is rounded to float32; the rotation is computed in float32 (float64 for float64 tensors) and
/// rounded once. The gradient is the inverse rotation of the output's gradient. Source: Su et al. 2021 (arXiv
/// 2104.09864); DeepSeek-V4 reference code.
struct RopeArgs {
  TensorView x;             ///< [tokens, heads, d] float64|float32|float16|bfloat16, heads any distance apart
  TensorView positions;     ///< [tokens] int64
  TensorView inv_freq;      ///< [pairs] float32, radians per position; 2 · pairs <= d
  bool interleaved = true;  ///< DeepSeek's pairing; false: half-split, as in GPT-NeoX and LLaMA
  bool inverse = false;     ///< rotate by the opposite angle
  TensorView y;             ///< out [tokens, heads, d] x's dtype, heads any distance apart; may be x itself
};
DSM_API void rope(const RopeArgs& args, const Launch& launch = {});

/// The frequencies for rope: 1 / base^(2i / d_rope) for pair i, in float32. With factor > 1 they are stretched by YaRN:
/// pairs that turn more than beta_fast times within original_length positions keep their frequency, those that turn
/// less than beta_slow times get it divided by factor, with a linear ramp between.
/// Source: Peng et al. 2023 (arXiv 2309.00071), in the form of the DeepSeek-V3 and V4 reference code.
struct RopeFrequenciesArgs {
  double base = 10000;            ///< > 1
  double factor = 1;              ///< >= 1; 1: no YaRN
  double original_length = 4096;  ///< context length trained without stretching, tokens, > 0
  double beta_fast = 32;          ///< turns, >= beta_slow
  double beta_slow = 1;           ///< turns, > 0
  TensorView inv_freq;            ///< out [d_rope / 2] float32 on the CPU
};
DSM_API void rope_frequencies(const RopeFrequenciesArgs& args);

/// The scale of attention scores that goes with YaRN in DeepSeek-V3 and V3.2: m² / sqrt(d_qk) with
/// m = 0.1 · mscale · ln(factor) + 1, for factor 1 just 1 / sqrt(d_qk). DeepSeek-V4 has no such correction. d_qk is the
/// width of a query before any absorption (192 in V3), > 0; factor >= 1.
/// Source: Peng et al. 2023 (arXiv 2309.00071); DeepSeek-V3 reference code.
DSM_API double yarn_softmax_scale(std::int64_t d_qk, double factor, double mscale = 1);

/// DeepSeek-V4's last step towards a query: each head is normalised without a weight, then its last d_rope = 2 · pairs
/// dimensions are rotated, interleaved, as in rope:
///
///   rstd = 1 / sqrt(mean(q²) + eps),   y = rope(q · rstd)
///
/// computed in float32 (float64 for float64 tensors) from end to end and rounded once. DeepSeek's reference code
/// instead rounds the squares, their mean, rstd and q · rstd to bfloat16 on the way; production kernels do as here. The
/// two differ by one or two units of bfloat16's last place. Source: DeepSeek-V4 reference code; vLLM's fused kernel.
struct V4QNormRopeArgs {
  TensorView q;          ///< [tokens, heads, d] float64|float32|float16|bfloat16, heads any distance apart
  TensorView positions;  ///< [tokens] int64
  TensorView inv_freq;   ///< [pairs] float32, radians per position; 2 · pairs <= d
  double eps = 1e-6;     ///< added to the mean square, >= 0
  TensorView y;          ///< out [tokens, heads, d] q's dtype, contiguous
  TensorView rstd;       ///< out [tokens, heads] float32 (float64 for float64 q), for the backward pass
};
DSM_API void v4_q_norm_rope(const V4QNormRopeArgs& args, const Launch& launch = {});

/// Gradient of v4_q_norm_rope. With g = the inverse rotation of dy: dq = rstd · (g − q · rstd² · Σ(g · q) / d).
struct V4QNormRopeBackwardArgs {
  TensorView dy;  ///< [tokens, heads, d] q's dtype, heads any distance apart
  TensorView q;   ///< as in the forward call, like positions and inv_freq
  TensorView positions;
  TensorView inv_freq;
  TensorView rstd;  ///< [tokens, heads] as returned by the forward call
  TensorView dq;    ///< out [tokens, heads, d] q's dtype, contiguous
};
DSM_API void v4_q_norm_rope_backward(const V4QNormRopeBackwardArgs& args, const Launch& launch = {});

/// The first half of DeepSeek-V4's output projection. The values that attention averages carry a rotation by their
/// positions; turning the result back by the query's leaves relative positions. Heads are then projected in groups of
/// neighbours, a block-diagonal matrix:
///
///   r = rope(o) with inverse and interleaved, rounded to o's dtype
///   z[t, g · rank + i] = Σ_j r[t, heads of group g, flattened][j] · wo_a[g · rank + i, j]
///
/// accumulated in float32 (float64 for float64 tensors) and rounded once. The model's second half, wo_b, is a linear
/// layer of its own. Source: DeepSeek-V4 reference code.
struct V4OutputProjectionArgs {
  TensorView o;          ///< [tokens, heads, d] float64|float32|float16|bfloat16, heads any distance apart
  TensorView positions;  ///< [tokens] int64, of the queries
  TensorView inv_freq;   ///< [pairs] float32, radians per position; 2 · pairs <= d
  TensorView wo_a;       ///< [groups · rank, heads / groups · d] o's dtype
  std::int64_t groups;   ///< >= 1; divides heads and wo_a's rows
  TensorView z;          ///< out [tokens, groups · rank] o's dtype, contiguous
};
DSM_API void v4_output_projection(const V4OutputProjectionArgs& args, const Launch& launch = {});

/// Gradients of v4_output_projection, those that are wanted; the rounding between its two steps counts as none. Sums
/// over tokens are taken in a fixed order.
struct V4OutputProjectionBackwardArgs {
  TensorView dz;  ///< [tokens, groups · rank] o's dtype, rows any distance apart
  TensorView o;   ///< as in the forward call, like all that follow up to groups
  TensorView positions;
  TensorView inv_freq;
  TensorView wo_a;
  std::int64_t groups;
  TensorView d_o;    ///< out [tokens, heads, d] o's dtype, contiguous; absent: not wanted
  TensorView dwo_a;  ///< out, as wo_a; absent: not wanted
};
DSM_API void v4_output_projection_backward(const V4OutputProjectionBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
