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

// What makes of a chunk the quotients by a scale that is a number, or such that their codes are the same.

class ByPowerOfTwo {
 public:
  /// Of scales of E4M3 blocks, whose reciprocals are no subnormal numbers.
  __device__ explicit ByPowerOfTwo(float8_e8m0fnu scale)
      : reciprocal_(__builtin_bit_cast(float, (254u - scale.bits) << 23)) {}
  template <class T>
  __device__ __forceinline__ void divide(const Chunk<T>& chunk, float* to) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      Chunk<T> quotients;
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i)
        reinterpret_cast<__nv_bfloat162*>(quotients.at)[i] = __hmul2(chunk.pair(i), __float2bfloat162_rn(reciprocal_));
      quotients.values(to);
    } else {
      chunk.values(to);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) to[i] *= reciprocal_;
    }
  }

 private:
  float reciprocal_;
};

/// A call: it is rare, and long.
static __device__ __noinline__ float any_quotient(float x, float divisor) { return x / divisor; }

/// Division by a positive normal number, rounded as the processor's own: the quotient by the reciprocal, twice improved
/// by what it leaves, which a fused product shows exactly (Markstein 1990). Too small a divisor could make that
/// underflow; then the processor divides.
template <class T>
class ByNumber {
 public:
  __device__ explicit ByNumber(float scale) : divisor_(scale), reciprocal_(1.0f / scale), near_(scale >= 0x1p-64f) {}
  __device__ __forceinline__ void divide(const Chunk<T>& chunk, float* to) const {
    chunk.values(to);
    if (near_) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        float quotient = to[i] * reciprocal_;
        quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, to[i]), reciprocal_, quotient);
        quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, to[i]), reciprocal_, quotient);
        to[i] = copysignf(quotient, to[i]);  // for zero
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) to[i] = any_quotient(to[i], divisor_);
    }
  }

 private:
  float divisor_, reciprocal_;
  bool near_;
};

/// Of bfloat16, by the scale of E4M3 blocks: the product by the first 16 bits of the reciprocal is exact, and that by
/// the others, which are not negative, so that zero keeps its sign, adds to it what decides. Compared for every block's
/// largest value and every value: the codes are those of the rounded quotients.
template <>
class ByNumber<bfloat16> {
 public:
  __device__ explicit ByNumber(float scale) {
    const float reciprocal = 1.0f / scale;
    first_ = __builtin_bit_cast(float, bits_of(reciprocal) & 0xffffff00u);
    rest_ = fmaxf(__fmaf_rn(-scale, first_, 1.0f) * reciprocal, 0.0f);
  }
  __device__ __forceinline__ void divide(const Chunk<bfloat16>& chunk, float* to) const {
    chunk.values(to);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = __fmaf_rn(to[i], rest_, to[i] * first_);
  }

 private:
  float first_, rest_;
};

/// Stores the E4M3 codes of the quotients of some neighbouring chunks; of the values themselves where the scale is NaN.
template <int kCount, class By, class T>
__device__ __forceinline__ void store_e4m3(const Chunk<T>* chunks, const By& by, bool scale_is_nan, std::uint8_t* to,
                                           bool aligned) {
  float x[kCount * kChunk];
  if (scale_is_nan) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) chunks[c].values(x + c * kChunk);
    auto codes = cuda::e4m3_codes(x);
#pragma unroll
    for (int i = 0; i < kCount * kChunk; ++i)  // NaN keeps its sign, which the conversion forgets
      codes.at[i] |= bits_of(x[i]) >> 31 << 7;
    return cuda::store_bytes(to, codes, aligned);
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) by.divide(chunks[c], x + c * kChunk);
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

/// The E2M1 codes nearest to the quotients of a chunk by a scale that is a number, ties to even. amax: the largest
/// magnitude of the scale's group.
template <class T>
__device__ __forceinline__ std::uint32_t e2m1_codes_of_quotients(const Chunk<T>& chunk, float scale, float amax) {
  const float near = nearly_reciprocal(scale);
  const bool beyond = amax > 6.5f * scale;  // as the largest scale, and subnormal ones, can be much below amax / 6
  std::uint32_t codes = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    // Two steps give the quotient in bfloat16. Of 8 bits by 4 it is a tie, or so far from one that it stays on its
    // side. Then it is added, twice, once and by half, to numbers whose unit is 1, so that the least of the sums counts
    // codes.
    using Pair = __nv_bfloat162;
    const Pair first = __float2bfloat162_rn(near);
    const Pair rest = __float2bfloat162_rn(__fmaf_rn(-__low2float(first), scale, 1.0f) * near);
    Pair magnitudes[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) magnitudes[i] = __habs2(chunk.pair(i));
    if (beyond) {
#pragma unroll
      for (Pair& pair : magnitudes) pair = __hmin2(pair, __float2bfloat162_rn(6 * scale));
    }
    std::uint32_t words[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const Pair x = magnitudes[i], quotient = __hfma2(x, first, __hmul2(x, rest));
      const Pair code = __hmin2(__hfma2(quotient, __float2bfloat162_rn(2.0f), __float2bfloat162_rn(192.0f)),
                                __hmin2(__hfma2(quotient, __float2bfloat162_rn(1.0f), __float2bfloat162_rn(194.0f)),
                                        __hfma2(quotient, __float2bfloat162_rn(0.5f), __float2bfloat162_rn(196.0f))));
      words[i] = reinterpret_cast<const std::uint32_t&>(code) | (chunk.word(i) >> 12 & 0x00080008u);
    }
    const std::uint32_t low = words[0] + (words[1] << 8), high = words[2] + (words[3] << 8);
    codes = __byte_perm(low, high, 0x5410) + (__byte_perm(low, high, 0x7632) << 4);
    constexpr std::uint32_t kNone = 0x43404340u + (0x43404340u << 8), kLow = kNone & 0xffffu, kHigh = kNone >> 16;
    codes -= kLow * 0x10001u + (kHigh * 0x10001u << 4);
  } else {
    // The quotient, rounded as float, is added to numbers whose units are 1/2, 1 and 2: the least of the three sums,
    // where codes are counted, is right for its range.
    float x[kChunk];
    chunk.values(x);
    if (beyond) {
#pragma unroll
      for (float& value : x) value = fmaxf(fminf(value, 6 * scale), -6 * scale);
    }
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
