// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// Element-wise functions and reductions. Included only by kernels_*.cpp: see vectors.h.

#include "src/cpu/kernels.h"
#include "src/cpu/vectors.h"

namespace dsm::cpu {
namespace {

template <class T>
inline Vector<T> load_part(const T* x, Index count, T rest) {
  if (count >= kLanes<T>) return load<T>(x);
  T part[kLanes<T>];
  for (Index l = 0; l < kLanes<T>; ++l) part[l] = l < count ? x[l] : rest;
  return load<T>(part);
}

template <class T>
inline void store_part(T* y, Vector<T> value, Index count) {
  if (count >= kLanes<T>) return store(y, value);
  T part[kLanes<T>];
  store(part, value);
  for (Index l = 0; l < count; ++l) y[l] = part[l];
}

/// y[i] = function(x[i]) over vectors; y may be x.
template <class T, class Function>
inline void map(const T* x, Index n, T* y, Function function) {
  for (Index i = 0; i < n; i += kLanes<T>) store_part(y + i, function(load_part<T>(x + i, n - i, 0)), n - i);
}

/// Folds vector(i, count), the values of elements i.., with `combine`: element i goes to partial result i modulo
/// 128 bytes, and these are folded pairwise, so that the order does not depend on the vector width.
template <class T, class VectorAt, class Combine>
inline T reduce(Index n, T identity, VectorAt vector, Combine combine) {
  constexpr int lanes = kLanes<T>, width = 128 / sizeof(T), vectors = width / lanes;
  Vector<T> partial[vectors];
  for (int v = 0; v < vectors; ++v) partial[v] = broadcast(identity);
  Index i = 0;
  for (; i + width <= n; i += width)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) partial[v] = combine(partial[v], vector(i + v * lanes, Index(lanes)));
  for (int v = 0; v < vectors && i + v * lanes < n; ++v)
    partial[v] = combine(partial[v], vector(i + v * lanes, n - i - v * lanes));
  T fold[width];
  for (int v = 0; v < vectors; ++v) store(fold + v * lanes, partial[v]);
  for (int half = width / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) fold[l] = combine(fold[l], fold[l + half]);
  return fold[0];
}

constexpr auto kAdd = [](auto a, auto b) { return a + b; };

template <class T>
struct Exp;
template <>
struct Exp<float> {
  using Integer = std::int32_t;
  static constexpr int kFractionBits = 23, kBias = 127, kDegree = 7;
  static constexpr float kLowest = -104, kHighest = 89;  // beyond: 0 and infinity
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
};
template <>
struct Exp<double> {
  using Integer = std::int64_t;
  static constexpr int kFractionBits = 52, kBias = 1023, kDegree = 13;
  static constexpr double kLowest = -746, kHighest = 710;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

/// e^x = 2^n e^r, x = n ln2 + r, |r| <= ln2 / 2, with the Taylor polynomial of e^r (truncation below 0.1 ulp).
/// ln2's upper part has so few bits that n times it is exact. NaN stays NaN.
template <class T>
inline Vector<T> exp(Vector<T> x) {
  using E = Exp<T>;
  using I = Vector<typename E::Integer>;
  constexpr T shift = T(3) * T(typename E::Integer(1) << (E::kFractionBits - 1));  // adding it rounds to integers
  x = x < E::kLowest ? broadcast(E::kLowest) : x;
  x = x > E::kHighest ? broadcast(E::kHighest) : x;
  const Vector<T> shifted = multiply_add(x, broadcast(T(0x1.71547652b82fep0)), broadcast(shift)), n = shifted - shift;
  const Vector<T> r = multiply_add(n, broadcast(-E::kLn2Low), multiply_add(n, broadcast(-E::kLn2High), x));
  Vector<T> result = {};
  double factorial = 1;
  for (int i = 2; i <= E::kDegree; ++i) factorial *= i;
#pragma GCC unroll 16
  for (int i = E::kDegree; i >= 0; --i) {
    result = multiply_add(result, r, broadcast(T(1 / factorial)));
    factorial /= i > 0 ? i : 1;
  }
  // Two factors, because 2^n alone overflows or is subnormal where the result is not yet.
  const I origin = bit_cast<I>(broadcast(shift));
  const I all = bit_cast<I>(shifted) - origin, half = bit_cast<I>(n * T(0.5) + shift) - origin;
  const auto power_of_2 = [](I e) { return bit_cast<Vector<T>>((e + E::kBias) << E::kFractionBits); };
  return result * power_of_2(half) * power_of_2(all - half);
}

template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
  const Vector<T> e = exp<T>(x < 0 ? x : -x);  // at most 1: no overflow, and full precision in both tails
  return (x < 0 ? e : broadcast(T(1))) / (1 + e);
}

template <class T>
T exp_scaled_array(T* x, Index n, T scale, T shift) {
  const auto apply = [=](Index i, Index count) {
    const Vector<T> argument = multiply_add(load_part<T>(x + i, count, 0), broadcast(scale), broadcast(-shift));
    store_part(x + i, exp<T>(argument), count);
    return load_part<T>(x + i, count, 0);
  };
  return reduce<T>(n, 0, apply, kAdd);
}

template <class T>
void sigmoid_array(const T* x, Index n, T* y) {
  map(x, n, y, [](Vector<T> v) { return sigmoid<T>(v); });
}

template <class T>
void silu_array(const T* x, Index n, T* y) {
  map(x, n, y, [](Vector<T> v) { return v * sigmoid<T>(v); });
}

template <class T>
void scale_array(T* x, Index n, T factor) {
  map<T>(x, n, x, [=](Vector<T> v) { return v * factor; });
}

template <class T>
T max_of_array(const T* x, Index n) {
  const auto larger = [](auto a, auto b) { return b > a ? b : a; };  // false, keeping a, where b is NaN
  const T lowest = -static_cast<T>(__builtin_inf());
  return reduce<T>(n, lowest, [=](Index i, Index count) { return load_part(x + i, count, lowest); }, larger);
}

template <class T>
T sum_of_array(const T* x, Index n) {
  return reduce<T>(n, 0, [=](Index i, Index count) { return load_part<T>(x + i, count, 0); }, kAdd);
}

template <class T>
T dot_of_arrays(const T* x, const T* y, Index n) {
  const auto product = [=](Index i, Index count) {
    return load_part<T>(x + i, count, 0) * load_part<T>(y + i, count, 0);
  };
  return reduce<T>(n, 0, product, kAdd);
}

template <class T, class Storage>
void narrow_array(const T* x, Index n, Storage* out) {
  Index i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) narrow<T>(load<T>(x + i), out + i);
  if (i == n) return;
  Storage part[kLanes<T>];
  narrow<T>(load_part<T>(x + i, n - i, 0), part);
  for (Index l = 0; i + l < n; ++l) out[i + l] = part[l];
}

template <class T>
void narrow_to(const T* x, Index n, void* out, DType dtype) {
  switch (dtype) {
    case DType::float64:
      return narrow_array(x, n, static_cast<double*>(out));
    case DType::float32:
      return narrow_array(x, n, static_cast<float*>(out));
    case DType::float16:
      return narrow_array(x, n, static_cast<Float16*>(out));
    case DType::bfloat16:
      return narrow_array(x, n, static_cast<BFloat16*>(out));
    default:
      __builtin_trap();  // callers have refused it
  }
}

}  // namespace
}  // namespace dsm::cpu
