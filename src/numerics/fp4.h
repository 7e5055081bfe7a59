// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/float_format.h"

namespace dsm {

/// FP4 E2M1: codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign. No infinity, no NaN.
/// Source: OCP Microscaling Formats (MX) Specification 1.0.
struct float4_e2m1 {
  using Format = FloatFormat<2, 1, Specials::none>;
  std::uint8_t bits;  ///< 0..15
};

DSM_HD_INLINE constexpr float to_float(float4_e2m1 x) { return decode<float4_e2m1::Format>(x.bits); }

/// Nearest E2M1 to a float or double, ties to the even code (2.5 -> 2, 3.5 -> 4, 5 -> 4); beyond the range ±6.
/// NaN becomes +6: quantisers must let it show in the block's scale.
template <class T>
DSM_HD_INLINE constexpr float4_e2m1 to_e2m1(T x) {
  return {static_cast<std::uint8_t>(encode<float4_e2m1::Format, Overflow::saturate>(x))};
}

/// Two neighbours in one byte: the element of even index in the low nibble.
DSM_HD_INLINE constexpr std::uint8_t pack_e2m1(float4_e2m1 even, float4_e2m1 odd) {
  return static_cast<std::uint8_t>(even.bits | odd.bits << 4);
}
DSM_HD_INLINE constexpr float4_e2m1 even_e2m1(std::uint8_t pair) { return {static_cast<std::uint8_t>(pair & 15)}; }
DSM_HD_INLINE constexpr float4_e2m1 odd_e2m1(std::uint8_t pair) { return {static_cast<std::uint8_t>(pair >> 4)}; }

}  // namespace dsm
