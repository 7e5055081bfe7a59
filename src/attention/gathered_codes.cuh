// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "src/cuda/copy/codes.cuh"
#include "src/cuda/copy/element.cuh"
#include "src/numerics/e8m0.h"

// Codes of caches as 16-bit elements, eight at a time. Exact: bfloat16 and float16 hold every E4M3 and E2M1 number, and
// bfloat16 their products with scales of few bits.
namespace dsm::attention {

/// 8 numbers as T's.
template <class T>
__device__ __forceinline__ uint4 chunk_of(const float (&x)[8]) {
  cuda::Pack<T, 8> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.at[i] = cuda::narrowed<T>(x[i]);
  return __builtin_bit_cast(uint4, pack);
}
/// As above, of 8 E4M3 codes.
template <class T>
__device__ __forceinline__ uint4 e4m3_chunk(uint2 codes) {
  const std::uint32_t words[2] = {codes.x, codes.y};
  std::uint32_t pairs[4];
#if __CUDA_ARCH__ >= 890
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(pairs[2 * i]), "=r"(pairs[2 * i + 1])
        : "r"(words[i]));
  if constexpr (std::is_same_v<T, bfloat16>) {
#pragma unroll
    for (std::uint32_t& pair : pairs) {
      const __nv_bfloat162 both = __float22bfloat162_rn(__half22float2(reinterpret_cast<const __half2&>(pair)));
      pair = reinterpret_cast<const std::uint32_t&>(both);
    }
  }
#else
  const auto nan = [](std::uint32_t word) { return ((word & 0x7f7f7f7f) + 0x01010101) & 0x80808080; };
  if (nan(words[0]) | nan(words[1])) {
    float x[8];
    cuda::widen_e4m3(__builtin_bit_cast(cuda::Bytes<8>, codes), x);
    return chunk_of<T>(x);
  }
  // The bits are those of a T whose exponent is too small, subnormal where E4M3 is.
  constexpr int kShift = std::is_same_v<T, bfloat16> ? 4 : 1;
  const auto scaled = [](std::uint32_t bits) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      const __nv_bfloat162 pair =
          __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), __float2bfloat162_rn(0x1p120f));
      return reinterpret_cast<const std::uint32_t&>(pair);
    } else {
      const __half2 pair = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(0x1p8f));
      return reinterpret_cast<const std::uint32_t&>(pair);
    }
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t odd = words[i], even = words[i] << 8;
    const std::uint32_t of_odd = scaled((odd & 0x80008000) | (odd & 0x7f007f00) >> kShift);
    const std::uint32_t of_even = scaled((even & 0x80008000) | (even & 0x7f007f00) >> kShift);
    pairs[2 * i] = __byte_perm(of_even, of_odd, 0x5410), pairs[2 * i + 1] = __byte_perm(of_even, of_odd, 0x7632);
  }
#endif
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

/// 8 bfloat16 times a scale that is one, too; exact for scales of so few bits.
__device__ __forceinline__ uint4 scaled_chunk(uint4 chunk, __nv_bfloat162 by) {
  std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (std::uint32_t& word : words) {
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(word), by);
    word = reinterpret_cast<const std::uint32_t&>(product);
  }
  return {words[0], words[1], words[2], words[3]};
}

/// Elements made of E2M1 codes and E4M3 scales are their values times this: with more, scales of codes as e2m1_chunk
/// leaves them would leave bfloat16.
inline constexpr float kE2m1Unit = 0x1p-8f;

/// 8 E2M1 codes times a scale. As bits of a bfloat16 whose exponent is too small, subnormal where E2M1 is, codes are
/// 2^-126 times as large. Their signs change the scale's.
__device__ __forceinline__ uint4 e2m1_chunk(std::uint32_t codes, __nv_bfloat162 by) {
  const std::uint32_t shifted = codes << 4, scale = reinterpret_cast<const std::uint32_t&>(by);
  const auto pair = [&](unsigned byte) {
    const std::uint32_t high = __byte_perm(codes, shifted, byte << 12 | (4 + byte) << 4);  // of both halves
    const std::uint32_t magnitudes = high >> 6 & 0x01c001c0, signed_scale = (high & 0x80008000) ^ scale;
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(magnitudes),
                                           reinterpret_cast<const __nv_bfloat162&>(signed_scale));
    return reinterpret_cast<const std::uint32_t&>(product);
  };
  return {pair(0), pair(1), pair(2), pair(3)};
}

/// A scale as two bfloat16: E8M0, or E4M3 of what e2m1_chunk takes.
template <class Scale>
__device__ __forceinline__ __nv_bfloat162 scale_pair(std::uint8_t scale) {
  if constexpr (std::is_same_v<Scale, float8_e8m0fnu>) {
    std::uint32_t both = max(scale * 0x00800080u, 0x00400040u);  // the exponent, but 2^-127 is subnormal
    if (scale == 255) both |= 0x00400040;                        // NaN
    return reinterpret_cast<const __nv_bfloat162&>(both);
  } else {
    float both[2];
    cuda::widen_e4m3(cuda::Bytes<2>{{scale, 0}}, both);
    return __float2bfloat162_rn(both[0] * (0x1p126f * kE2m1Unit));
  }
}

}  // namespace dsm::attention
