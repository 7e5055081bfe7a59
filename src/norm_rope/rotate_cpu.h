// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include "dsm/tensor_view.h"
#include "src/numerics/float_traits.h"
#include "src/numerics/rope.h"

namespace dsm {

/// The rotations of a token's heads, worked out anew only when another token is asked for.
template <class A>
class TokenRotations {
 public:
  /// positions [tokens] int64, inv_freq [pairs] float32.
  TokenRotations(const TensorView& positions, const TensorView& inv_freq, bool backwards)
      : positions_(positions.as<const std::int64_t>()),
        inv_freq_(inv_freq.as<const float>()),
        backwards_(backwards),
        rotations_(inv_freq.size(0)) {}

  /// One per pair, valid until the next call.
  const std::vector<Rotation<A>>& of(std::int64_t token) {
    if (token == token_) return rotations_;
    for (std::size_t i = 0; i < rotations_.size(); ++i) {
      const Rotation<A> forward = rope_rotation<A>(rope_angle(positions_[token], inv_freq_[i]));
      rotations_[i] = backwards_ ? inverse(forward) : forward;
    }
    token_ = token;
    return rotations_;
  }

 private:
  const std::int64_t* positions_;
  const float* inv_freq_;
  bool backwards_;
  std::int64_t token_ = -1;
  std::vector<Rotation<A>> rotations_;
};

/// One head's rotated part. Pair i is (x[2i], x[2i + 1]) when Interleaved, (x[i], x[pairs + i]) otherwise; y may be x.
template <bool Interleaved, class T>
void rotate_part(const std::vector<Rotation<Compute<T>>>& rotations, const T* x, T* y) {
  const std::int64_t pairs = static_cast<std::int64_t>(rotations.size());
  constexpr std::int64_t kStep = Interleaved ? 2 : 1;
  const std::int64_t partner = Interleaved ? 1 : pairs;
  for (std::int64_t i = 0; i < pairs; ++i) {
    Compute<T> a = widen(x[kStep * i]), b = widen(x[kStep * i + partner]);
    rotate(rotations[i], a, b);
    y[kStep * i] = narrow<T>(a);
    y[kStep * i + partner] = narrow<T>(b);
  }
}

/// Rotates the last dimensions of a head of d elements in place, interleaved.
template <class A>
void rotate_head(const std::vector<Rotation<A>>& rotations, A* head, std::int64_t d) {
  A* const part = head + d - 2 * static_cast<std::int64_t>(rotations.size());
  rotate_part<true>(rotations, part, part);
}

}  // namespace dsm
