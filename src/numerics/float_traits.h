// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include "src/numerics/bf16.h"
#include "src/numerics/fp16.h"

namespace dsm {

/// The type that an operator computes in for tensors of element type T: double for double, float for all others.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// An element in its compute type; exact.
template <class T>
DSM_HD_INLINE constexpr Compute<T> widen(T x) {
  if constexpr (std::is_floating_point_v<T>)
    return x;
  else
    return to_float(x);
}

/// The element nearest to a float or double: one rounding, ties to even, overflow to infinity.
template <class T, class Wide>
DSM_HD_INLINE constexpr T narrow(Wide x) {
  static_assert(std::is_floating_point_v<Wide>);
  if constexpr (std::is_same_v<T, bfloat16>)
    return to_bfloat16(x);
  else if constexpr (std::is_same_v<T, float16>)
    return to_float16(x);
  else
    return static_cast<T>(x);
}

}  // namespace dsm
