// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

// Manifold-constrained hyper-connections: a token's residual is hc streams of `hidden` elements. Before a sub-layer
// hc_pre mixes the streams into its one input, after it hc_post writes its output back to all of them and mixes them
// among each other; hc_head mixes them into the model's last hidden state.
//
// "wide" below: float64 when x is float64, else float32, in which everything is computed; results of x's dtype are
// rounded once. Source: Xie et al. 2025 (arXiv 2512.24880); DeepSeek-V4 reference code.

namespace dsm {

/// A sub-layer's input and the two mixes with which hc_post writes back. With a token's hc · hidden elements x in one
/// row, and the outputs of the projection numbered pre: hc, post: hc, comb: hc · hc (row j, column k):
///
///   rstd  = 1 / sqrt(mean(x²) + norm_eps),   mixes = (x · fnᵀ) · rstd
///   a     = mixes · scale + base             with scale[0] for pre, scale[1] for post, scale[2] for comb
///   pre   = sigmoid(a_pre) + eps,   post = post_mult · sigmoid(a_post)
///   comb  = softmax of each row of a_comb, + eps; then every column divided by its sum + eps; then iterations − 1
///           times every row, then every column divided by its sum + eps (Sinkhorn-Knopp, columns last)
///   mixed = Σ_j pre[j] · x[j]
struct HcPreArgs {
  TensorView x;            ///< [tokens, hc, hidden] float64|float32|float16|bfloat16, streams any distance apart
  TensorView fn;           ///< [(2 + hc) · hc, hc · hidden] wide
  TensorView base;         ///< [(2 + hc) · hc] wide
  TensorView scale;        ///< [3] wide
  int iterations = 20;     ///< >= 1
  double eps = 1e-6;       ///< >= 0
  double norm_eps = 1e-6;  ///< >= 0
  double post_mult = 2;    ///< largest weight with which a stream takes the sub-layer's output
  TensorView mixed;        ///< out [tokens, hidden] x's dtype
  TensorView post;         ///< out [tokens, hc] wide
  TensorView comb;         ///< out [tokens, hc, hc] wide; hc_post uses it transposed: row = source stream
  TensorView mixes;        ///< out [tokens, (2 + hc) · hc] wide, for the backward pass
  TensorView rstd;         ///< out [tokens] wide, for the backward pass
};
DSM_API void hc_pre(const HcPreArgs& args, const Launch& launch = {});

/// Gradients of hc_pre, through the scaling and all iterations, which are computed once more. Sums over tokens are
/// taken in a fixed order.
struct HcPreBackwardArgs {
  TensorView dmixed;  ///< [tokens, hidden] x's dtype, rows any distance apart
  TensorView dpost;   ///< [tokens, hc] wide
  TensorView dcomb;   ///< [tokens, hc, hc] wide
  TensorView x;       ///< as in the forward call, like all that follow up to post_mult
  TensorView fn;
  TensorView base;
  TensorView scale;
  int iterations = 20;
  double eps = 1e-6;
  double post_mult = 2;
  TensorView mixes;   ///< [tokens, (2 + hc) · hc] as returned by the forward call
  TensorView rstd;    ///< [tokens] as returned by the forward call
  TensorView dx;      ///< out [tokens, hc, hidden] x's dtype, contiguous
  TensorView dfn;     ///< out, as fn
  TensorView dbase;   ///< out, as base
  TensorView dscale;  ///< out, as scale
};
DSM_API void hc_pre_backward(const HcPreBackwardArgs& args, const Launch& launch = {});

/// The streams after a sub-layer with output y: out[k] = post[k] · y + Σ_j comb[j][k] · x[j].
struct HcPostArgs {
  TensorView y;     ///< [tokens, hidden] x's dtype, rows any distance apart
  TensorView x;     ///< [tokens, hc, hidden] float64|float32|float16|bfloat16: the streams before the sub-layer
  TensorView post;  ///< [tokens, hc] wide, from hc_pre
  TensorView comb;  ///< [tokens, hc, hc] wide, from hc_pre
  TensorView out;   ///< out [tokens, hc, hidden] x's dtype, contiguous; not x itself
};
DSM_API void hc_post(const HcPostArgs& args, const Launch& launch = {});

/// Gradients of hc_post:
///
///   dy = Σ_k post[k] · dout[k],   dx[j] = Σ_k comb[j][k] · dout[k],   dpost[k] = dout[k] · y,
///   dcomb[j][k] = dout[k] · x[j]
struct HcPostBackwardArgs {
  TensorView dout;  ///< [tokens, hc, hidden] x's dtype, streams any distance apart
  TensorView y;     ///< as in the forward call, like the next three
  TensorView x;
  TensorView post;
  TensorView comb;
  TensorView dy;     ///< out [tokens, hidden] x's dtype, contiguous
  TensorView dx;     ///< out [tokens, hc, hidden] x's dtype, contiguous
  TensorView dpost;  ///< out [tokens, hc] wide
  TensorView dcomb;  ///< out [tokens, hc, hc] wide
};
DSM_API void hc_post_backward(const HcPostBackwardArgs& args, const Launch& launch = {});

/// The last hidden state: mixed = Σ_j pre[j] · x[j] with pre as in hc_pre, from a projection of hc outputs. The weights
/// are not normalised.
struct HcHeadArgs {
  TensorView x;            ///< [tokens, hc, hidden] float64|float32|float16|bfloat16, streams any distance apart
  TensorView fn;           ///< [hc, hc · hidden] wide
  TensorView base;         ///< [hc] wide
  TensorView scale;        ///< [1] wide
  double eps = 1e-6;       ///< >= 0
  double norm_eps = 1e-6;  ///< >= 0
  TensorView mixed;        ///< out [tokens, hidden] x's dtype
  TensorView mixes;        ///< out [tokens, hc] wide, for the backward pass
  TensorView rstd;         ///< out [tokens] wide, for the backward pass
};
DSM_API void hc_head(const HcHeadArgs& args, const Launch& launch = {});

/// Gradients of hc_head, as those of hc_pre.
struct HcHeadBackwardArgs {
  TensorView dmixed;  ///< [tokens, hidden] x's dtype, rows any distance apart
  TensorView x;       ///< as in the forward call, like all that follow up to eps
  TensorView fn;
  TensorView base;
  TensorView scale;
  double eps = 1e-6;
  TensorView mixes;   ///< [tokens, hc] as returned by the forward call
  TensorView rstd;    ///< [tokens] as returned by the forward call
  TensorView dx;      ///< out [tokens, hc, hidden] x's dtype, contiguous
  TensorView dfn;     ///< out, as fn
  TensorView dbase;   ///< out, as base
  TensorView dscale;  ///< out, as scale
};
DSM_API void hc_head_backward(const HcHeadBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
