// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"

// A group of floats that share a scale: its largest magnitude, and its codes once the scale is chosen.

namespace dsm::cpu {

/// In float32; NaN if there is one: it has larger bits than every number.
template <class T>
float largest_magnitude(const T* x, std::int64_t n) {
  std::int32_t bits = 0;
  for (std::int64_t i = 0; i < n; ++i)
    bits = std::max(bits, static_cast<std::int32_t>(bits_of(static_cast<float>(x[i])) & 0x7fffffff));
  return __builtin_bit_cast(float, bits);
}

/// Under a NaN scale the codes do not matter: dividing by 1 keeps them the same on every processor.
inline float divisor_of(float scale) { return scale == scale ? scale : 1.0f; }

/// codes[i] = the E4M3 nearest to x[i] / scale, saturating.
inline void encode_e4m3(const float* x, std::int64_t n, float scale, std::uint8_t* codes) {
  const float divisor = divisor_of(scale);
  for (std::int64_t i = 0; i < n; ++i) codes[i] = to_e4m3_saturating(x[i] / divisor).bits;
}

/// pairs[i] = the E2M1 nearest to x[2i] / scale and, in the upper nibble, to x[2i + 1] / scale, saturating; n is even.
inline void encode_e2m1(const float* x, std::int64_t n, float scale, std::uint8_t* pairs) {
  const float divisor = divisor_of(scale);
  for (std::int64_t i = 0; i < n / 2; ++i)
    pairs[i] = pack_e2m1(to_e2m1(x[2 * i] / divisor), to_e2m1(x[2 * i + 1] / divisor));
}

}  // namespace dsm::cpu
