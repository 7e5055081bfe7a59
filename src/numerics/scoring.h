// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "src/numerics/host_device.h"

// The scalar functions of routers and gated feed-forward layers, and their derivatives with respect to x, in float or
// double. None overflows on the way to a representable result, and what tends to zero keeps its relative accuracy for
// as long as e^x is a normal number. NaN gives NaN.

namespace dsm {

/// 1 / (1 + e^-x)
template <class T>
DSM_HD_INLINE T sigmoid(T x) {
  const T e = std::exp(-std::abs(x));
  return (x < 0 ? e : 1) / (1 + e);
}

/// σ(x) · σ(-x)
template <class T>
DSM_HD_INLINE T sigmoid_derivative(T x) {
  const T e = std::exp(-std::abs(x));
  return e / ((1 + e) * (1 + e));
}

/// x · σ(x); NaN at -infinity, as in PyTorch.
template <class T>
DSM_HD_INLINE T silu(T x) {
  return x * sigmoid(x);
}

/// σ(x) · (1 + x · σ(-x)); NaN at ±infinity.
template <class T>
DSM_HD_INLINE T silu_derivative(T x) {
  return sigmoid(x) * (1 + x * sigmoid(-x));
}

/// log(1 + e^x), by definition x itself for x > 20.
template <class T>
DSM_HD_INLINE T softplus(T x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}

/// σ(x), 1 for x > 20
template <class T>
DSM_HD_INLINE T softplus_derivative(T x) {
  return x > 20 ? T(1) : sigmoid(x);
}

// Below this softplus(x) = e^x in every type, and its square root is e^(x/2) long after e^x has become zero.
inline constexpr int kSoftplusIsExp = -40;

/// sqrt(softplus(x)), the router score of DeepSeek-V4.
template <class T>
DSM_HD_INLINE T sqrt_softplus(T x) {
  return x < kSoftplusIsExp ? std::exp(x / 2) : std::sqrt(softplus(x));
}

/// softplus'(x) / (2 · sqrt(softplus(x)))
template <class T>
DSM_HD_INLINE T sqrt_softplus_derivative(T x) {
  return x < kSoftplusIsExp ? std::exp(x / 2) / 2 : softplus_derivative(x) / (2 * std::sqrt(softplus(x)));
}

}  // namespace dsm
