// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "src/cuda/copy/codes.cuh"
#include "src/kv_cache/row_chunk.cuh"
#include "src/numerics/e8m0.h"
#include "src/numerics/kv_record.h"

// Codes of the quotients of chunks by their scales: the processor's bits, in few instructions.

namespace dsm {

// What makes a chunk's values quotients by the scale; 1 stands in for a scale that is NaN.

class ByPowerOfTwo {
 public:
  /// Of scales of E4M3 blocks, whose reciprocals are no subnormal numbers.
  __device__ explicit ByPowerOfTwo(float8_e8m0fnu scale)
      : reciprocal_(scale.bits == 255 ? 1.0f : __builtin_bit_cast(float, (254u - scale.bits) << 23)) {}
  template <int N>
  __device__ __forceinline__ void divide(float (&x)[N]) const {
#pragma unroll
    for (float& value : x) value *= reciprocal_;
  }

 private:
  float reciprocal_;
};

/// A call: it is rare, and long.
static __device__ __noinline__ float any_quotient(float x, float divisor) { return x / divisor; }

/// Division by a positive number, rounded as the processor's own: the quotient by the reciprocal, twice improved by
/// what it leaves, which a fused product shows exactly (Markstein 1990). Too small a divisor could make that underflow;
/// then the processor divides.
class ByNumber {
 public:
  __device__ explicit ByNumber(float scale)
      : divisor_(scale == scale ? scale : 1.0f), reciprocal_(1.0f / divisor_), near_(scale >= 0x1p-64f) {}
  template <int N>
  __device__ __forceinline__ void divide(float (&x)[N]) const {
    if (near_) {
#pragma unroll
      for (float& value : x) {
        float quotient = value * reciprocal_;
        quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, value), reciprocal_, quotient);
        quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, value), reciprocal_, quotient);
        value = copysignf(quotient, value);  // for zero
      }
    } else {
#pragma unroll
      for (float& value : x) value = any_quotient(value, divisor_);
    }
  }

 private:
  float divisor_, reciprocal_;
  bool near_;
};

/// Stores the E4M3 codes of the quotients of some neighbouring chunks.
template <int kCount, class By, class T>
__device__ __forceinline__ void store_e4m3(const Chunk<T>* chunks, const By& by, bool scale_is_nan, std::uint8_t* to,
                                           bool aligned) {
  float x[kCount * kChunk];
#pragma unroll
  for (int c = 0; c < kCount; ++c) chunks[c].values(x + c * kChunk);
  if (scale_is_nan) {  // NaN keeps its sign, which the conversion forgets
    std::uint32_t signs = 0;
#pragma unroll
    for (int i = 0; i < kCount * kChunk; ++i) signs |= bits_of(x[i]) >> 31 << i;
    by.divide(x);
    auto codes = cuda::e4m3_codes(x);
#pragma unroll
    for (int i = 0; i < kCount * kChunk; ++i) codes.at[i] |= (signs >> i & 1) << 7;
    return cuda::store_bytes(to, codes, aligned);
  }
  by.divide(x);
  cuda::store_bytes(to, cuda::e4m3_codes(x), aligned);
}

__device__ __forceinline__ bool is_nan(float8_e8m0fnu scale) { return scale.bits == 255; }

/// 1 / x to within an ulp or two, for normal x.
__device__ __forceinline__ float nearly_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// src/numerics/kv_record.h's in fewer instructions: a quotient by 6 is that by the reciprocal, improved by what it
/// leaves (Markstein 1990), as no quotient by a number of so few bits is near the middle of two floats.
__device__ __forceinline__ float8_e4m3fn e2m1_scale(float amax, float of_zeros) {
  constexpr float kSixth = 1.0f / 6.0f;
  const float near = amax * kSixth, sixth = __fmaf_rn(__fmaf_rn(-near, 6.0f, amax), kSixth, near);
  const float limited = bits_of(amax) <= 3 ? of_zeros : fmaxf(sixth, 0x1p-9f);  // 3 units and less: amax / 6 is zero
  const float both[2] = {limited, 0};
  const std::uint8_t code = cuda::e4m3_codes(both).at[0];
  return {bits_of(amax) >= 0x7f800000 ? static_cast<std::uint8_t>(float8_e4m3fn::Format::kNan) : code};
}

/// The E2M1 codes nearest to the quotients of a chunk by a scale that is a number, ties to even.
template <class T>
__device__ __forceinline__ std::uint32_t e2m1_codes_of_quotients(const Chunk<T>& chunk, float scale) {
  float x[kChunk];
  chunk.values(x);
  const float near = nearly_reciprocal(scale);
  std::uint32_t codes = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    // As float16, 2^14 times smaller, so that both formats are subnormal at once: then a code is the first bits behind
    // the sign. Of 8 bits by 4 a quotient is a tie, or further from it than two roundings can take it.
    const float factor = near * 0x1p-14f;
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const __half2 pair = __floats2half2_rn(x[i] * factor, x[i + kChunk / 2] * factor);
      const auto bits = reinterpret_cast<const std::uint32_t&>(pair);
      const std::uint32_t rounded = bits + 0x00ff00ffu + (bits >> 9 & 0x00010001u);
      const auto placed = [&](int from) {
        return from >= 4 * i ? rounded >> (from - 4 * i) : rounded << (4 * i - from);
      };
      codes |= (placed(9) & 0x00070007u << 4 * i) | (placed(12) & 0x00080008u << 4 * i);
    }
  } else {
    // The quotient, rounded as float, is added to numbers whose units are 1/2, 1 and 2: the least of the three sums,
    // where codes are counted, is right for its range.
    const float reciprocal = __fmaf_rn(__fmaf_rn(-near, scale, 1.0f), near, near);
    constexpr float kHalves = 0x1.8p22f, kOnes = 0x1.8p23f, kTwos = 0x1.8p24f;
    constexpr auto kFirst = static_cast<std::int32_t>(bits_of(kHalves));
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const float about = x[i] * reciprocal;
      const float quotient = fabsf(__fmaf_rn(__fmaf_rn(-about, scale, x[i]), reciprocal, about));
      std::int32_t code = __float_as_int(quotient + kHalves);
      code = min(code, __float_as_int(quotient + kOnes) + (kFirst - static_cast<std::int32_t>(bits_of(kOnes)) + 2));
      code = min(code, __float_as_int(quotient + kTwos) + (kFirst - static_cast<std::int32_t>(bits_of(kTwos)) + 4));
      codes = __funnelshift_l(bits_of(x[i]), codes, 1) * 8 + static_cast<std::uint32_t>(code);
    }
    codes -= bits_of(kHalves) * 0x11111111u;
  }
  return codes;
}

}  // namespace dsm
