// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_row_copies.cuh"

// Copied rows of V3.2's cache whose codes become float16 in registers: what their scales come to.

namespace dsm::sparse_mla_sm90 {

/// Half of a block's rows. A row's values are 2^e times its codes times factors, the largest from 32 to 64, so that
/// float16 has room for both.
struct FactoredRows : CopiedRows<KvV32Fp8, KvV32Fp8> {
  static constexpr int kGroups = KvV32Fp8::kQuantized / KvV32Fp8::kGroup;

  alignas(16) __half factors[kGroups][32];  // at factor_place
  float power[32];                          // 2^e
  __nv_bfloat16 inverse[32];                // 2^-e
};

/// Where the factor of a row is among those of 32: the eight that a thread of a quad has, as wgmma takes values from
/// registers, side by side.
__device__ __forceinline__ int factor_place(int row) { return row / 2 % 4 * 8 + row / 8 * 2 + row % 2; }

/// Makes the factors of 16 rows, from the `first`, by the lower lanes of a warp.
__device__ __forceinline__ void factor_rows(FactoredRows& rows, int first) {
  constexpr int kMostExponent = 60;  // so that neither 2^e nor 2^-e takes a weight out of float32's range
  const int lane = threadIdx.x % 32, row = first + lane;
  if (lane < 16) {
    const uint4 scales = load_piece(cuda::shared_address(rows.bytes[row]) + KvV32Fp8::kScalesAt);
    std::uint32_t largest = 0;
#pragma unroll
    for (int g = 0; g < FactoredRows::kGroups; ++g) largest = max(largest, word(scales, g) & 0x7fffffff);
    const int exponent = min(max(static_cast<int>(largest >> 23) - 126 - 6, -kMostExponent), kMostExponent);
    const float inverse = __uint_as_float((127 - exponent) << 23);
#pragma unroll
    for (int g = 0; g < FactoredRows::kGroups; ++g)
      rows.factors[g][factor_place(row)] = __float2half_rn(__uint_as_float(word(scales, g)) * inverse);
    rows.power[row] = __uint_as_float((127 + exponent) << 23);
    rows.inverse[row] = __float2bfloat16_rn(inverse);
  }
  __syncwarp();
}

}  // namespace dsm::sparse_mla_sm90
