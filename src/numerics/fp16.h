// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/float_format.h"

namespace dsm {

/// IEEE 754 binary16: 1 sign, 5 exponent and 10 mantissa bits. Largest number 65504, smallest 2^-24.
struct float16 {
  using Format = FloatFormat<5, 10, Specials::infinity_nan>;
  std::uint16_t bits;
};

DSM_HD_INLINE constexpr float to_float(float16 x) { return decode<float16::Format>(x.bits); }

/// Nearest float16 to a float or double, ties to even, overflow to infinity.
template <class T>
DSM_HD_INLINE constexpr float16 to_float16(T x) {
  return {static_cast<std::uint16_t>(encode<float16::Format, Overflow::to_infinity>(x))};
}

}  // namespace dsm
