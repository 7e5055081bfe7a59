// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/copy/pack.cuh"
#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"

// Neighbouring codes of 8 and 4 bits, as bytes: the numbers of src/numerics, in the device's own instructions where it
// has them.

namespace dsm::cuda {

template <int N>
using Bytes = Pack<std::uint8_t, N>;

/// N bytes in the widest words, which the compiler does not take apart.
template <int N>
using WordOf = std::conditional_t<N % 4 == 0, std::uint32_t, std::conditional_t<N == 2, std::uint16_t, std::uint8_t>>;
template <int N>
using Words = Pack<WordOf<N>, N / static_cast<int>(sizeof(WordOf<N>))>;

template <int N, bool kAligned>
__device__ __forceinline__ Words<N> load_words(const std::uint8_t* from) {
  using Word = WordOf<N>;
  if constexpr (kAligned) {
    return load_pack<static_cast<int>(sizeof(Words<N>) / sizeof(Word))>(reinterpret_cast<const Word*>(from));
  } else {
    Words<N> words{};
#pragma unroll
    for (int i = 0; i < N; ++i)
      words.at[i / sizeof(Word)] |= static_cast<Word>(std::uint32_t{from[i]} << 8 * (i % sizeof(Word)));
    return words;
  }
}

template <int N>
__device__ __forceinline__ void store_bytes(std::uint8_t* to, const Bytes<N>& bytes, bool aligned) {
  if (aligned) return store_pack(to, bytes);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = bytes.at[i];
}

/// Of two codes.
__device__ __forceinline__ float2 widen_e4m3_pair(std::uint16_t pair) {
#if __CUDA_ARCH__ >= 890
  __half2 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(reinterpret_cast<std::uint32_t&>(halves)) : "h"(pair));
  return __half22float2(halves);
#else
  return {to_float(float8_e4m3fn{static_cast<std::uint8_t>(pair & 0xff)}),
          to_float(float8_e4m3fn{static_cast<std::uint8_t>(pair >> 8)})};
#endif
}

/// Two E2M1 codes, at 4 bits of both halves of a word, from bit `at` on.
__device__ __forceinline__ float2 widen_e2m1_pair(std::uint32_t word, int at) {
  const auto moved = [&](int to) { return to >= at ? word << (to - at) : word >> (at - to); };
  // The bits are those of a float16 whose exponent is 14 too small, subnormal where E2M1 is.
  const std::uint32_t bits = (moved(12) & 0x80008000u) | (moved(9) & 0x0e000e00u);
  return __half22float2(__hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(0x1p14f)));
}

template <int N>
__device__ __forceinline__ void widen_e4m3(const Words<N>& codes, float (&to)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float2 low = widen_e4m3_pair(static_cast<std::uint16_t>(codes.at[i / 4]));
      const float2 high = widen_e4m3_pair(static_cast<std::uint16_t>(codes.at[i / 4] >> 16));
      to[i] = low.x, to[i + 1] = low.y, to[i + 2] = high.x, to[i + 3] = high.y;
    }
  } else {
    static_assert(N == 2);
    const float2 both = widen_e4m3_pair(codes.at[0]);
    to[0] = both.x, to[1] = both.y;
  }
}
template <int N>
__device__ __forceinline__ void widen_e4m3(const Bytes<N>& codes, float (&to)[N]) {
  widen_e4m3(__builtin_bit_cast(Words<N>, codes), to);
}

template <int N>
__device__ __forceinline__ void widen_e2m1(const Words<N / 2>& pairs, float (&to)[N]) {
  if constexpr (N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 8)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 both = widen_e2m1_pair(pairs.at[i / 8], 4 * j);
        to[i + j] = both.x, to[i + j + 4] = both.y;
      }
  } else {
    static_assert(N == 2 || N == 4);
    const std::uint32_t word = pairs.at[0];
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const std::uint32_t apart = (word >> 4 * i & 15u) | (word >> 4 * i & 0xf0u) << 12;
      const float2 both = widen_e2m1_pair(apart, 0);
      to[i] = both.x, to[i + 1] = both.y;
    }
  }
}
/// The nearest codes, ties to even, saturating; the sign of NaN may be lost.
template <int N>
__device__ __forceinline__ Bytes<N> e4m3_codes(const float (&x)[N]) {
#if __CUDA_ARCH__ >= 890
  if constexpr (N % 4 == 0) {
    struct alignas(N) {
      std::uint32_t at[N / 4];
    } words;
#pragma unroll
    for (int i = 0; i < N; i += 4)
      asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
          "mov.b32 %0, {low, high}; }"
          : "=r"(words.at[i / 4])
          : "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]));
    return __builtin_bit_cast(Bytes<N>, words);
  } else {
    struct alignas(N) {
      std::uint16_t at[N / 2];
    } pairs;
#pragma unroll
    for (int i = 0; i < N; i += 2)
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pairs.at[i / 2]) : "f"(x[i + 1]), "f"(x[i]));
    return __builtin_bit_cast(Bytes<N>, pairs);
  }
#else
  Bytes<N> codes;
#pragma unroll
  for (int i = 0; i < N; ++i) codes.at[i] = to_e4m3_saturating(x[i]).bits;
  return codes;
#endif
}

template <int N>
__device__ __forceinline__ Bytes<N / 2> e2m1_codes(const float (&x)[N]) {
  Bytes<N / 2> pairs;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) pairs.at[i] = pack_e2m1(to_e2m1(x[2 * i]), to_e2m1(x[2 * i + 1]));
  return pairs;
}

}  // namespace dsm::cuda
