// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/float_format.h"

namespace dsm {

/// bfloat16: 1 sign, 8 exponent and 7 mantissa bits; the upper half of a float. Largest number 3.3895314e38.
struct bfloat16 {
  using Format = FloatFormat<8, 7, Specials::infinity_nan>;
  std::uint16_t bits;
};

DSM_HD_INLINE constexpr float to_float(bfloat16 x) { return decode<bfloat16::Format>(x.bits); }

/// Nearest bfloat16 to a float or double, ties to even, overflow to infinity.
template <class T>
DSM_HD_INLINE constexpr bfloat16 to_bfloat16(T x) {
  return {static_cast<std::uint16_t>(encode<bfloat16::Format, Overflow::to_infinity>(x))};
}

}  // namespace dsm
