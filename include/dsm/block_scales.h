// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/tensor_view.h"

namespace dsm {

/// What turns quantised weights [..., n, k] into numbers, beside the codes themselves, which blocks along k share:
///
///   FP8     codes float8_e4m3fn [..., n, k]; block_rows x block_columns elements share a scale, float8_e8m0fnu (or
///           uint8, the same bits) or float32 [..., ceil(n / block_rows), ceil(k / block_columns)]
///   MXFP4   codes uint8|int8 [..., n, k / 2], two E2M1 in a byte, the one of even k in the low nibble; scale
///           float8_e8m0fnu (or uint8) [..., n, k / 32]
///   NVFP4   codes as MXFP4's; scale float8_e4m3fn [..., n, k / 16] and global float32: one factor [], one per leading
///           index [...] or one per row [..., n]
///
/// An element is (code · scale) · global, where the first product is exact but for float32 scales: with those, and with
/// a global scale, it is rounded once, to float32; for float64 activations it is exact. All tensors are contiguous.
/// Sources: OCP Microscaling Formats 1.0; NVIDIA ModelOpt; DeepSeek-V3 and -V4 checkpoints.
struct BlockScales {
  TensorView scale{};                              ///< absent: the weights are floating, not quantised
  TensorView global{};                             ///< present exactly for NVFP4
  std::int64_t block_rows = 1, block_columns = 1;  ///< FP8's, at least 1; the FP4 formats do not read them

  explicit operator bool() const { return bool(scale); }
};

/// What a product makes of its activations first.
enum class ActivationFormat : std::uint8_t {
  none,  ///< taken as they come
  /// Rounded to FP8: groups of 128 neighbours of a row (the last one may be shorter) share the scale
  /// s = the smallest power of two >= max(max|x|, 1e-4) · float(1/448), and x becomes e4m3(x / s) · s. NaN and infinity
  /// make their whole group NaN. Source: act_quant of the DeepSeek-V4 reference code.
  fp8,
};

}  // namespace dsm
