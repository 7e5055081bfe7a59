// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "src/numerics/host_device.h"

// Softmax over a set of keys from softmaxes over its parts. A part is known by its maximum m and its sum l = Σ e^(s -
// m) while it is being made, and by its lse = m + log(l) (natural log) when it is finished. A part without keys, or
// with all scores -infinity, has m = lse = -infinity and l = 0; its output is 0. No result is NaN unless an input is: a
// score of +infinity takes the whole weight, several share it equally.

namespace dsm {

// A constant, because device code may not call std::numeric_limits.
template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

/// e^(x - m) for x <= m, where m is a maximum: 0 for x = -infinity, 1 for x = m, infinite or not.
template <class T>
DSM_HD_INLINE T exp_below_max(T x, T m) {
  if (x == -kInfinity<T>) return 0;
  return x == m ? T(1) : std::exp(x - m);
}

/// Maximum and scaled sum of the exponentials of some scores.
template <class T>
struct SoftmaxState {
  T m = -kInfinity<T>;
  T l = 0;
};

/// What was accumulated under the maximum `from` must be multiplied by this when the maximum becomes `to` >= `from`.
template <class T>
DSM_HD_INLINE T softmax_rescale(T from, T to) {
  return exp_below_max(from, to);
}

template <class T>
DSM_HD_INLINE SoftmaxState<T> merge(SoftmaxState<T> a, SoftmaxState<T> b) {
  const T m = a.m < b.m ? b.m : a.m;
  return {m, a.l * softmax_rescale(a.m, m) + b.l * softmax_rescale(b.m, m)};
}

template <class T>
DSM_HD_INLINE T lse(SoftmaxState<T> state) {
  return state.m + std::log(state.l);
}

/// The softmax over two finished parts: output = a · output_a + b · output_b. Both weights are 0 when neither part has
/// a key, otherwise they add up to 1.
template <class T>
struct MergedLse {
  T lse, a, b;
};

template <class T>
DSM_HD_INLINE MergedLse<T> merge_lse(T lse_a, T lse_b) {
  const T m = lse_a < lse_b ? lse_b : lse_a;
  const T a = exp_below_max(lse_a, m), b = exp_below_max(lse_b, m);
  const T sum = a + b;
  if (sum == 0) return {m, 0, 0};
  return {m + std::log(sum), a / sum, b / sum};
}

/// What the output of a softmax is multiplied by when its denominator gains e^sink, i.e. one more score with a zero
/// value: e^lse / (e^lse + e^sink). 0 when there is no key. The sink does not enter the lse.
template <class T>
DSM_HD_INLINE T sink_factor(T lse, T sink) {
  return merge_lse(lse, sink).a;
}

}  // namespace dsm
