// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/cpu/kernels.h"

// Rows of float or double (T). Reductions fold in an order that depends on n alone.

namespace dsm::cpu {

/// x[i] = exp(x[i] * scale - shift), within 2 ulp of the exponential of the argument computed with one rounding where
/// the processor fuses, else two; subnormal results are not flushed. -inf gives 0, NaN stays. Returns the sum of the
/// results.
template <class T>
T exp_scaled(T* x, std::int64_t n, T scale, T shift) {
  return kernels<T>().exp_scaled(x, n, scale, shift);
}

/// y[i] = 1 / (1 + exp(-x[i])), within 3 ulp. y may be x.
template <class T>
void sigmoid(const T* x, std::int64_t n, T* y) {
  kernels<T>().sigmoid(x, n, y);
}

/// y[i] = x[i] / (1 + exp(-x[i])), within 4 ulp where exp(x[i]) is normal (x > -87, double: -708) and within 2 |x|
/// times the smallest subnormal beyond; NaN at -inf, as the formula. y may be x.
template <class T>
void silu(const T* x, std::int64_t n, T* y) {
  kernels<T>().silu(x, n, y);
}

template <class T>
void scale(T* x, std::int64_t n, T factor) {
  kernels<T>().scale(x, n, factor);
}

/// The largest element; NaN is passed over, and -inf the largest of none.
template <class T>
T max(const T* x, std::int64_t n) {
  return kernels<T>().max(x, n);
}

template <class T>
T sum(const T* x, std::int64_t n) {
  return kernels<T>().sum(x, n);
}

template <class T>
T dot(const T* x, const T* y, std::int64_t n) {
  return kernels<T>().dot(x, y, n);
}

}  // namespace dsm::cpu
