// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/float_format.h"

namespace dsm {

/// OCP FP8 E4M3: 4 exponent and 3 mantissa bits, no infinity, NaN is the code of all ones. Largest number 448,
/// smallest 2^-9. Source: OCP 8-bit Floating Point Specification 1.0.
struct float8_e4m3fn {
  using Format = FloatFormat<4, 3, Specials::nan>;
  std::uint8_t bits;
};

/// OCP FP8 E5M2: 5 exponent and 2 mantissa bits, infinity and NaN as in IEEE 754. Largest number 57344, smallest 2^-16.
struct float8_e5m2 {
  using Format = FloatFormat<5, 2, Specials::infinity_nan>;
  std::uint8_t bits;
};

DSM_HD_INLINE constexpr float to_float(float8_e4m3fn x) { return decode<float8_e4m3fn::Format>(x.bits); }
DSM_HD_INLINE constexpr float to_float(float8_e5m2 x) { return decode<float8_e5m2::Format>(x.bits); }

// Two rules for E4M3 are in use; a caller names the one it means.

/// Nearest E4M3 to a float or double, ties to even; beyond the range (infinity too) ±448. The rule
/// of quantisers, and of PyTorch since it saturates (2.13 does).
template <class T>
DSM_HD_INLINE constexpr float8_e4m3fn to_e4m3_saturating(T x) {
  return {static_cast<std::uint8_t>(encode<float8_e4m3fn::Format, Overflow::saturate>(x))};
}

/// Nearest E4M3 to a float or double, ties to even; NaN beyond the range, i.e. above 464. The
/// specification's non-saturating mode, and older PyTorch's rule.
template <class T>
DSM_HD_INLINE constexpr float8_e4m3fn to_e4m3_or_nan(T x) {
  return {static_cast<std::uint8_t>(encode<float8_e4m3fn::Format, Overflow::to_nan>(x))};
}

/// Nearest E5M2 to a float or double, ties to even, overflow to infinity.
template <class T>
DSM_HD_INLINE constexpr float8_e5m2 to_e5m2(T x) {
  return {static_cast<std::uint8_t>(encode<float8_e5m2::Format, Overflow::to_infinity>(x))};
}

}  // namespace dsm
