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

}  // namespace dsm
