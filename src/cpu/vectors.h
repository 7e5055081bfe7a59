// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// SIMD vectors in the compiler's vector extension, at the width of the instruction set this file is compiled for.
//
// Included only by src/cpu/kernels_*.cpp, which are compiled for different processors and linked together. So that
// the linker can never pick, say, an AVX-512 copy of a function for everybody, everything here and in *_kernels.h has
// internal linkage, and no header that defines functions (the standard library's, src/numerics) is used. This is why
// the 16-bit conversions are written out here; tests compare them with src/numerics for every code.

#include <cstdint>
#include <utility>  // std::integer_sequence, a type

#if defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Vectors wider than the registers are passed between functions that are all in this file: no ABI to be kept.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dsm::cpu {
namespace {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage of the 16-bit types; distinct, so that overloads tell them apart.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int N>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * N)));
};

/// N elements of T as one value with element-wise operators.
template <class T, int N = kLanes<T>>
using Vector = typename VectorOf<T, N>::Type;

template <class V>
inline V load_bytes(const void* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof v);
  return v;
}

template <class V>
inline void store(void* target, const V& v) {
  __builtin_memcpy(target, &v, sizeof v);
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return load_bytes<To>(&from);
}

template <class T, int N = kLanes<T>>
inline Vector<T, N> broadcast(T x) {
  return x - Vector<T, N>{};  // x - 0 is x, also for -0
}

// multiply_add(a, b, c) = a * b + c, fused where the instruction set can. Written out, because whether the compiler
// fuses an expression depends on what surrounds it, and all kernels must give the same bits.
#if defined(__AVX512F__)
inline Vector<float, 16> multiply_add(Vector<float, 16> a, Vector<float, 16> b, Vector<float, 16> c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Vector<double, 8> multiply_add(Vector<double, 8> a, Vector<double, 8> b, Vector<double, 8> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#endif
#if defined(__FMA__)
inline Vector<float, 8> multiply_add(Vector<float, 8> a, Vector<float, 8> b, Vector<float, 8> c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Vector<double, 4> multiply_add(Vector<double, 4> a, Vector<double, 4> b, Vector<double, 4> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__aarch64__)
inline Vector<float, 4> multiply_add(Vector<float, 4> a, Vector<float, 4> b, Vector<float, 4> c) {
  return bit_cast<Vector<float, 4>>(
      vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
}
inline Vector<double, 2> multiply_add(Vector<double, 2> a, Vector<double, 2> b, Vector<double, 2> c) {
  return bit_cast<Vector<double, 2>>(
      vfmaq_f64(bit_cast<float64x2_t>(c), bit_cast<float64x2_t>(a), bit_cast<float64x2_t>(b)));
}
#else
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

/// `mask` lanes are all ones or all zeros.
template <class I>
inline I select(I mask, I if_true, I if_false) {
  return (mask & if_true) | (~mask & if_false);
}

// N consecutive elements of a storage type; the 16-bit types as floats, exactly.

template <int N>
inline Vector<double, N> widen(const double* source) {
  return load_bytes<Vector<double, N>>(source);
}

template <int N>
inline Vector<float, N> widen(const float* source) {
  return load_bytes<Vector<float, N>>(source);
}

template <int N>
inline Vector<float, N> widen(const BFloat16* source) {
  const auto bits = load_bytes<Vector<std::uint16_t, N>>(source);
  return bit_cast<Vector<float, N>>(__builtin_convertvector(bits, Vector<std::uint32_t, N>) << 16);
}

template <int N>
inline Vector<float, N> widen(const Float16* source) {
  using F = Vector<float, N>;
  using I = Vector<std::int32_t, N>;
#if defined(__AVX512F__) && defined(__F16C__)
  if constexpr (N == 16) return bit_cast<F>(_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(source)));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return bit_cast<F>(_mm256_cvtph_ps(load_bytes<__m128i>(source)));
#endif
  const I half = __builtin_convertvector(load_bytes<Vector<std::uint16_t, N>>(source), I);
  const I exponent = half & 0x7c00, payload = (half & 0x7fff) << 13;
  const I normal = payload + ((127 - 15) << 23), special = payload | 0x7f800000;
  const I subnormal = bit_cast<I>(__builtin_convertvector(half & 0x3ff, F) * 0x1p-24f);
  const I magnitude = select<I>(exponent == 0, subnormal, select<I>(exponent == 0x7c00, special, normal));
  return bit_cast<F>(magnitude | ((half & 0x8000) << 16));
}

/// kLanes<Acc> consecutive elements of a storage type as Acc. Exact, but float64 to float32 rounds.
template <class Acc, class T>
inline Vector<Acc> load(const T* source) {
  return __builtin_convertvector(widen<kLanes<Acc>>(source), Vector<Acc>);
}
// The other way: rounds to nearest, ties to even; NaN stays NaN (quiet, its payload cut).

template <class T>
inline void narrow(Vector<T> value, double* target) {
  store(target, __builtin_convertvector(value, Vector<double, kLanes<T>>));
}

template <class T>
inline void narrow(Vector<T> value, float* target) {
  store(target, __builtin_convertvector(value, Vector<float, kLanes<T>>));
}

template <class T>
inline void narrow(Vector<T> value, BFloat16* target) {
  constexpr int n = kLanes<T>;
  using U = Vector<std::uint32_t, n>;
  using I = Vector<std::int32_t, n>;
  const Vector<float, n> x = __builtin_convertvector(value, Vector<float, n>);
  const U bits = bit_cast<U>(x), upper = bits >> 16;
  const U result = select<U>(bit_cast<U>(I(x != x)), upper | 0x40, (bits + 0x7fff + (upper & 1)) >> 16);
  store(target, __builtin_convertvector(result, Vector<std::uint16_t, n>));
}

template <class T>
inline void narrow(Vector<T> value, Float16* target) {
  constexpr int n = kLanes<T>;
  using F = Vector<float, n>;
  using I = Vector<std::int32_t, n>;
  const F x = __builtin_convertvector(value, F);
#if defined(__AVX512F__) && defined(__F16C__)
  if constexpr (n == 16)
    return store(target, _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (n == 8) return store(target, _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
  const I bits = bit_cast<I>(x), magnitude = bits & 0x7fffffff;
  // Adding 0.5 leaves multiples of 2^-24, the unit of subnormals, in the low bits.
  const I subnormal = bit_cast<I>(bit_cast<F>(magnitude) + 0.5f) - bit_cast<std::int32_t>(0.5f);
  const I normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const I finite =
      select<I>(magnitude < ((127 - 14) << 23), subnormal, select<I>(normal < 0x7c00, normal, I{} + 0x7c00));
  const I nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const I result = select<I>(magnitude > 0x7f800000, nan, finite) | ((bits >> 16) & 0x8000);
  store(target, __builtin_convertvector(result, Vector<std::uint16_t, n>));
}

// Transposition of kSide x kSide elements, in vectors of at most 32 bytes: wider ones shuffle no faster, and kSide
// streams whose distance is a multiple of the page size must fit into one set of the first-level cache.

template <class T>
constexpr int kSide = (kVectorBytes < 32 ? kVectorBytes : 32) / static_cast<int>(sizeof(T));

template <class V, int... L>
inline V join(const auto& first_half, const auto& second_half, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(first_half, second_half, L...);
}

/// Exchanges the second half of a with the first half of b.
template <class V, int... L>
inline void exchange_halves(V& a, V& b, std::integer_sequence<int, L...>) {
  constexpr int n = sizeof...(L), half = n / 2;
  const V low = __builtin_shufflevector(a, b, (L < half ? L : n + L - half)...);
  b = __builtin_shufflevector(a, b, (L < half ? L + half : n + L)...);
  a = low;
}

/// Elements of a and b in turn, from the first (Upper 0) or second (1) half of each 16-byte lane: one instruction.
template <int Upper, class V, int... L>
inline V interleave(const V& a, const V& b, std::integer_sequence<int, L...>) {
  constexpr int n = sizeof...(L), lane = n * 16 / static_cast<int>(sizeof(V));
  return __builtin_shufflevector(a, b, (L % 2 * n + L / lane * lane + Upper * lane / 2 + L % lane / 2)...);
}

/// columns[j] = elements j of kSide rows `stride` apart, as Acc.
template <class Acc, class T>
inline void load_transposed(const T* source, Index stride, Vector<Acc, kSide<Acc>>* columns) {
  constexpr int n = kSide<Acc>, lane = 16 / static_cast<int>(sizeof(Acc)), lanes = n / lane;
  constexpr std::make_integer_sequence<int, n> each;
  using V = Vector<Acc, n>;
  static_assert(lanes <= 2 && lane <= 4);
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    if constexpr (lanes == 2 && sizeof(T) == sizeof(Acc)) {  // lanes can be put in place by loads alone
      const T* p = source + i % lane * stride + i / lane * lane;
      columns[i] = join<V>(widen<lane>(p), widen<lane>(p + lane * stride), each);
    } else {
      columns[i] = __builtin_convertvector(widen<n>(source + i * stride), V);
    }
  }
  if constexpr (lanes == 2 && sizeof(T) != sizeof(Acc))
#pragma GCC unroll 4
    for (int i = 0; i < lane; ++i) exchange_halves(columns[i], columns[i + lane], each);
#pragma GCC unroll 2
  for (int group = 0; group < n; group += lane)
#pragma GCC unroll 2
    for (int round = 1; round < lane; round *= 2) {
      V* v = columns + group;
      V next[lane];
#pragma GCC unroll 2
      for (int i = 0; i < lane / 2; ++i) {
        next[2 * i] = interleave<0>(v[i], v[i + lane / 2], each);
        next[2 * i + 1] = interleave<1>(v[i], v[i + lane / 2], each);
      }
#pragma GCC unroll 4
      for (int i = 0; i < lane; ++i) v[i] = next[i];
    }
}

}  // namespace
}  // namespace dsm::cpu
