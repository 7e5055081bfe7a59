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

/// Largest angle of sincos_near: that of position 2^20 at frequency 1.
inline constexpr float kSincosNear = 0x1p20f;

/// dsm::sincos for angles up to kSincosNear in size, without a branch.
DSM_HD_INLINE SinCos<float> sincos_near(float angle) {
  // π/2 in three parts of 24 bits. After the first product the difference is exact: it is below 1 and a multiple of the
  // last place of either operand.
  constexpr float kHigh = 0x1.921fb6p+0f, kMiddle = -0x1.777a5cp-25f, kLow = -0x1.ee59dap-50f;
  constexpr float kTwoOverPi = 0x1.45f306p-1f;
  constexpr float kRounder = 0x1.8p23f;  // leaves the nearest integer in the low bits of a sum
  const float sum = fused(angle, kTwoOverPi, kRounder), quarters = sum - kRounder;
  const float r = fused(-quarters, kLow, fused(-quarters, kMiddle, fused(-quarters, kHigh, angle)));
  const float z = rounded_product(r, r);
  // Minimax polynomials for |r| <= 0.8175, a little more than π/4: `quarters` is the nearest integer but for 2^-5.
  const float sine_tail = fused(z, fused(z, -0x1.98bed8p-13f, 0x1.1105b4p-7f), -0x1.555542p-3f);
  const float sine = fused(rounded_product(r, z), sine_tail, r);
  const float cosine_tail = fused(z, fused(z, 0x1.99813ep-16f, -0x1.6c0ac8p-10f), 0x1.555548p-5f);
  const float cosine = fused(z, fused(z, cosine_tail, -0.5f), 1.0f);

  const std::uint32_t quadrant = __builtin_bit_cast(std::uint32_t, sum);  // and multiples of 4
  const std::uint32_t s = __builtin_bit_cast(std::uint32_t, quadrant & 1 ? cosine : sine);
  const std::uint32_t c = __builtin_bit_cast(std::uint32_t, quadrant & 1 ? sine : cosine);
  return {__builtin_bit_cast(float, s ^ (quadrant << 30 & 0x80000000u)),
          __builtin_bit_cast(float, c ^ ((quadrant + 1) << 30 & 0x80000000u))};
}

/// Sine and cosine of any float, within 1.6 units in the last place. Host and device give the same bits, but for about
/// one value in 10^7, where a sum formed in double is rounded twice.
///
/// float library functions differ from one library to the next, most of all far from zero, and double arithmetic would
/// bind the GPU kernels that need an angle for every pair of elements. So the angle is reduced by the nearest multiple
/// of π/2 in float, with fused operations that lose nothing, and put into polynomials.
DSM_HD_INLINE SinCos<float> sincos(float angle) {
  if (std::fabs(angle) <= kSincosNear) return sincos_near(angle);
  const double x = angle;
  return {static_cast<float>(std::sin(x)), static_cast<float>(std::cos(x))};
}

}  // namespace dsm
