// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "src/numerics/host_device.h"
#include "src/numerics/sincos.h"

namespace dsm {

/// YaRN's stretching of rotary frequencies to contexts of `factor` times the trained length. Frequencies that turn
/// more than beta_fast times within the trained length stay, those that turn less than beta_slow times are divided by
/// the factor, with a linear ramp between. factor 1 switches it off.
/// Source: Peng et al. 2023 (arXiv 2309.00071), in the form of the DeepSeek-V3 and V4 reference code.
struct Yarn {
  double factor = 1;
  double original_length = 4096;  ///< trained context length, tokens
  double beta_fast = 32;
  double beta_slow = 1;
};

/// Factor of attention scores' scale and of nothing else: 0.1 · mscale · ln(factor) + 1. DeepSeek-V3 multiplies the
/// softmax scale by its square; V4 does not use it.
DSM_HD inline double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

/// Rotary frequencies of a head part of d_rope dimensions, pair i of d_rope / 2: radians per position.
///
/// Plain: 1 / base^(2i / d_rope). Every step is rounded to float as in the reference code. The power is taken in double
/// first, where host and device round to the same float.
class RopeFrequencies {
 public:
  DSM_HD RopeFrequencies(int d_rope, double base, const Yarn& yarn = {})
      : d_rope_(d_rope), base_(base), factor_(static_cast<float>(yarn.factor)) {
    if (yarn.factor == 1) return;
    low_ = std::floor(pair_turning(yarn.beta_fast, yarn.original_length));
    high_ = std::ceil(pair_turning(yarn.beta_slow, yarn.original_length));
    if (low_ < 0) low_ = 0;
    if (high_ > d_rope - 1) high_ = d_rope - 1;
    if (high_ == low_) high_ += 0.001;  // a step, without dividing by zero
  }

  DSM_HD float operator()(int i) const {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(d_rope_);
    const float plain = 1.0f / static_cast<float>(std::pow(base_, static_cast<double>(exponent)));
    if (factor_ == 1) return plain;
    const float low = static_cast<float>(low_);
    float ramp = (static_cast<float>(i) - low) / static_cast<float>(high_ - low_);
    ramp = ramp < 0 ? 0 : (ramp > 1 ? 1 : ramp);
    const float keep = 1 - ramp;
    return rounded_product(plain / factor_, 1 - keep) + rounded_product(plain, keep);
  }

 private:
  /// The (real) index of the pair that turns `turns` times within the trained length.
  DSM_HD double pair_turning(double turns, double original_length) const {
    constexpr double kTwoPi = 6.283185307179586;
    return d_rope_ * std::log(original_length / (turns * kTwoPi)) / (2 * std::log(base_));
  }

  int d_rope_;
  double base_;
  float factor_;
  double low_ = 0, high_ = 0;
};

/// Angle of a pair: float(position) · frequency rounded to float, also for float64 tensors.
DSM_HD_INLINE float rope_angle(std::int64_t position, float frequency) {
  return rounded_product(static_cast<float>(position), frequency);
}

template <class T>
struct Rotation {
  T cos, sin;
};

/// Cosine and sine of an angle in T (float or double), the same on host and device: float library functions are not.
template <class T>
DSM_HD_INLINE Rotation<T> rope_rotation(float angle) {
  if constexpr (std::is_same_v<T, float>) {
    const SinCos<float> both = sincos(angle);
    return {both.cos, both.sin};
  } else {
    return {std::cos(static_cast<T>(angle)), std::sin(static_cast<T>(angle))};
  }
}

/// Rotates the pair (a, b) in place: (a·cos − b·sin, a·sin + b·cos). The products are rounded before they are added.
template <class T>
DSM_HD_INLINE void rotate(Rotation<T> r, T& a, T& b) {
  const T x = a, y = b;
  a = rounded_product(x, r.cos) - rounded_product(y, r.sin);
  b = rounded_product(x, r.sin) + rounded_product(y, r.cos);
}

/// The rotation by the opposite angle.
template <class T>
DSM_HD_INLINE Rotation<T> inverse(Rotation<T> r) {
  return {r.cos, -r.sin};
}

}  // namespace dsm
