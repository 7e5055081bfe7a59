// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "src/numerics/host_device.h"

namespace dsm {

template <class T>
struct SinCos {
  T sin, cos;
};

/// Largest angle of sincos_near.
inline constexpr float kSincosNear = 0x1p27f;

/// sincos_rounded for angles up to kSincosNear in size, without a branch.
DSM_HD_INLINE SinCos<float> sincos_near(float angle) {
  // π/2 in three parts. The first two have 26 bits: their products with quarters up to 2^27 are exact, and so are the
  // differences, hence the same with and without fused multiply-add.
  constexpr double kHigh = 0x1.921fb5p+0, kMiddle = 0x1.110b46p-26, kLow = 0x1.1a62633145c07p-54;
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  const double x = angle;
  constexpr double kRounder = 0x1.8p52;  // leaves the nearest integer in the low bits of a sum
  const double sum = rounded_product(x, kTwoOverPi) + kRounder, quarters = sum - kRounder;
  const double r = ((x - quarters * kHigh) - quarters * kMiddle) - quarters * kLow;
  const double z = r * r;
  constexpr double kSine[] = {-1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800};
  constexpr double kCosine[] = {-1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600};
  const double sine = r + r * z * (kSine[0] + z * (kSine[1] + z * (kSine[2] + z * (kSine[3] + z * kSine[4]))));
  const double cosine =
      1 + z * (kCosine[0] + z * (kCosine[1] + z * (kCosine[2] + z * (kCosine[3] + z * (kCosine[4] + z * kCosine[5])))));

  const auto quadrant = static_cast<unsigned>(__builtin_bit_cast(std::uint64_t, sum));  // and multiples of 4
  const float s = static_cast<float>(quadrant & 1 ? cosine : sine);
  const float c = static_cast<float>(quadrant & 1 ? sine : cosine);
  return {quadrant & 2 ? -s : s, (quadrant + 1) & 2 ? -c : c};
}

/// Sine and cosine of any float, rounded to float: the result differs from the correctly rounded one only where the
/// true value lies within 2^-12 units of the last place of a tie. Host and device give the same bits, but for about one
/// value in 10^8, where fused multiply-add moves the double result across a tie.
///
/// float implementations differ from one library to the next, most of all far from zero; double ones agree after
/// rounding but cost several times as much, above all on GPUs. This is double arithmetic with as many terms as a float
/// needs: the angle is reduced by the nearest multiple of π/2 and put into Taylor's series on [-π/4, π/4].
DSM_HD_INLINE SinCos<float> sincos_rounded(float angle) {
  if (std::fabs(angle) <= kSincosNear) return sincos_near(angle);
  const double x = angle;
  return {static_cast<float>(std::sin(x)), static_cast<float>(std::cos(x))};
}

}  // namespace dsm
