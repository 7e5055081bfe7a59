// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/cpu/vector_math.h"

// The gated activation of feed-forward layers on rows of float or double, with g = min(gate, limit) and
// u = clamp(up, -limit, limit). NaN stays NaN.

namespace dsm::cpu {

/// y = silu(g) · u. y may be gate.
template <class A>
void swiglu_row(const A* gate, const A* up, std::int64_t n, A limit, A* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = gate[i] > limit ? limit : gate[i];
  silu(y, n, y);
  for (std::int64_t i = 0; i < n; ++i) y[i] *= up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
}

/// dgate = scale · dy · u · silu'(g) where gate <= limit, dup = scale · dy · silu(g) where |up| <= limit, else 0; and
/// y = silu(g) · u once more. dgate may be gate, dup may be up.
template <class A>
void swiglu_backward_row(const A* dy, A scale, const A* gate, const A* up, std::int64_t n, A limit, A* y, A* dgate,
                         A* dup) {
  constexpr std::int64_t kPart = 256;
  // Both tails of the sigmoid: 1 - sigmoid(g) would lose what silu' has beyond 1.
  A sigma[kPart], rest[kPart];
  for (std::int64_t begin = 0; begin < n; begin += kPart) {
    const std::int64_t part = std::min(kPart, n - begin);
    for (std::int64_t i = 0; i < part; ++i) {
      sigma[i] = gate[begin + i] > limit ? limit : gate[begin + i];
      rest[i] = -sigma[i];
    }
    sigmoid(sigma, part, sigma);
    sigmoid(rest, part, rest);
    for (std::int64_t i = 0; i < part; ++i) {
      const std::int64_t at = begin + i;
      const A g = gate[at] > limit ? limit : gate[at];
      const A u = up[at] > limit ? limit : up[at] < -limit ? -limit : up[at];
      const A silu = g * sigma[i], d = scale * dy[at];
      const A slope_g = gate[at] > limit ? A(0) : u * (sigma[i] + silu * rest[i]);
      const A slope_u = up[at] > limit || up[at] < -limit ? A(0) : silu;
      y[at] = silu * u;
      dgate[at] = d * slope_g;
      dup[at] = d * slope_u;
    }
  }
}

}  // namespace dsm::cpu
