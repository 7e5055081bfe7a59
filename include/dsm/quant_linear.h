// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/block_scales.h"
#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

// Products with quantised weights. "floating" is float64|float32|float16|bfloat16.
namespace dsm {

/// y = Q(x) · Wᵀ, where W are the numbers that the codes and scales stand for (BlockScales) and Q is the activation
/// format. Products are accumulated in float32 (float64 for float64 x) and rounded once.
///
/// Order of the sum: products one after another within each 256 consecutive k, then these partial sums one after
/// another. Error before that rounding: at most (min(k, 256) + k / 256 + 2) · 2^-24 · Σ|Q(x) w|, and 2^-24 · Σ|Q(x) w|
/// more where a weight itself is rounded to float32. With activation_format fp8 and scales that are powers of two every
/// product of two codes and their scales is exact in float32. The DeepSeek reference code sums each 128 (FP8) or 32
/// (FP4) products of codes first and scales those sums: the same value within the same bound.
/// Sources: Lin8 and Lin4 of the DeepSeek-V4 reference code; DeepSeek-V3.
struct QuantLinearArgs {
  TensorView x{};        ///< [rows, k] floating, rows any distance apart
  TensorView weight{};   ///< codes of [n, k]
  BlockScales scales{};  ///< of the weight
  ActivationFormat activation_format = ActivationFormat::none;
  TensorView y{};  ///< out [rows, n] x's dtype, contiguous
};

/// dx = dy · W. The rounding of activations is passed straight through; codes and scales have no gradient.
struct QuantLinearBackwardArgs {
  TensorView dy{};       ///< [rows, n] floating, rows any distance apart
  TensorView weight{};   ///< as in the forward call
  BlockScales scales{};  ///< as in the forward call
  TensorView dx{};       ///< out [rows, k] dy's dtype, contiguous
};

/// FP8 weights: float8_e4m3fn codes.
DSM_API void fp8_linear(const QuantLinearArgs& args, const Launch& launch = {});
DSM_API void fp8_linear_backward(const QuantLinearBackwardArgs& args, const Launch& launch = {});

/// MXFP4 or NVFP4 weights: two E2M1 codes in a byte.
DSM_API void fp4_linear(const QuantLinearArgs& args, const Launch& launch = {});
DSM_API void fp4_linear_backward(const QuantLinearBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
