// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

// Quantisers. All round x to float32 first (float64 x only) and then compute in float32, in exactly the operations and
// the order stated, so that equal inputs give equal bytes everywhere. amax is the largest magnitude of a block. A NaN
// or infinity in a block makes the block's scale NaN: it shows in whatever is computed from the block.

/// FP8 E4M3 with one scale for each block of block_rows × block_columns elements; the last ones may be partial.
///
///   a = max(amax, float(1e-4))
///   e8m0 scales:     s = the smallest power of two >= a · float(1/448)
///   float32 scales:  s = a / 448
///   code = e4m3(x / s)        nearest, ties to even, saturating at ±448
///
/// In a block whose scale is NaN every code is NaN. Source: DeepSeek-V4 reference code, act_quant; DeepSeek-V3.
struct Fp8QuantizeArgs {
  TensorView x;  ///< [matrices, rows, columns] float64|float32|float16|bfloat16, elements of a row adjacent
  std::int64_t block_rows = 1;       ///< >= 1: 1 for activations, 128 for weights
  std::int64_t block_columns = 128;  ///< >= 1
  TensorView data;                   ///< out [matrices, rows, columns] float8_e4m3fn
  TensorView scales;  ///< out [matrices, ⌈rows / block_rows⌉, ⌈columns / block_columns⌉] float8_e8m0fnu|float32
};
DSM_API void fp8_quantize(const Fp8QuantizeArgs& args, const Launch& launch = {});

/// NVFP4: E2M1 codes, an E4M3 scale for 16 neighbours of a row and a float32 factor g for a matrix:
///
///   g     = amax of the matrix / 2688                 (2688 = 6 · 448), unless given
///   t     = amax / (6 · g);  t = 1 where t is 0       (every product and quotient rounded to float32)
///   scale = e4m3(clamp(t, 2^-9, 448))                 nearest, ties to even
///   code  = e2m1(x / (scale · g))                     nearest, ties to even, saturating at ±6; -0 becomes 0
///
/// A block of zeros has scale 1 and codes 0, whatever g. Source: NVIDIA Model Optimizer, NVFP4QTensor.
struct Nvfp4QuantizeArgs {
  TensorView x;             ///< [matrices, rows, columns] as in fp8_quantize; columns a multiple of 16
  TensorView given;         ///< [matrices] float32: g; absent: from x
  TensorView packed;        ///< out [matrices, rows, columns / 2] uint8: the low nibble is the element of even column
  TensorView scales;        ///< out [matrices, rows, columns / 16] float8_e4m3fn
  TensorView global_scale;  ///< out [matrices] float32: g
};
DSM_API void nvfp4_quantize(const Nvfp4QuantizeArgs& args, const Launch& launch = {});

/// How the scale of an MXFP4 block follows from amax.
enum class MxRule : std::uint8_t {
  ceil,  ///< the smallest power of two >= max(amax, 6·2^-126) · float(1/6): nothing saturates
  ocp,   ///< 2^(⌊log2 amax⌋ - 2), at least 2^-127: above 6 times the scale values saturate
};

/// MXFP4: E2M1 codes and a power of two for 32 neighbours of a row: code = e2m1(x / scale), nearest, ties to even,
/// saturating at ±6. Source: OCP Microscaling Formats (MX) 1.0, section 6.3; for ceil DeepSeek-V4 reference code.
struct Mxfp4QuantizeArgs {
  TensorView x;  ///< [matrices, rows, columns] as in fp8_quantize; columns a multiple of 32
  MxRule rule = MxRule::ceil;
  TensorView packed;  ///< out [matrices, rows, columns / 2] uint8: the low nibble is the element of even column
  TensorView scales;  ///< out [matrices, rows, columns / 32] float8_e8m0fnu
};
DSM_API void mxfp4_quantize(const Mxfp4QuantizeArgs& args, const Launch& launch = {});

/// MXFP4 as FP8 E4M3 with one power of two for each block of block_rows × block_columns elements, where that is exact.
/// The block's scale is the largest scale of its groups of 32 divided by 2^6, at least 2^-127; groups of zeros do not
/// count. A block is exact when every value over the scale is an E4M3 number: always when the largest scale is at most
/// 2^14 times the smallest (2^11 times without subnormal codes). NaN groups stay NaN and do not count. Source:
/// DeepSeek-V4 reference code, convert.
struct Mxfp4ToFp8Args {
  TensorView packed;                 ///< [matrices, rows, columns / 2] uint8, contiguous; columns a multiple of 32
  TensorView group_scales;           ///< [matrices, rows, columns / 32] float8_e8m0fnu, contiguous
  std::int64_t block_rows = 128;     ///< >= 1
  std::int64_t block_columns = 128;  ///< a multiple of 32
  TensorView data;                   ///< out [matrices, rows, columns] float8_e4m3fn
  TensorView scales;                 ///< out [matrices, ⌈rows / block_rows⌉, ⌈columns / block_columns⌉] float8_e8m0fnu
  TensorView exact;                  ///< out, scales' shape, boolean: where false, data of the block is rounded
};
DSM_API void mxfp4_to_fp8(const Mxfp4ToFp8Args& args, const Launch& launch = {});

}  // namespace dsm
