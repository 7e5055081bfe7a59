// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/visit_dtype.h"
#include "src/norm_rope/rope/rope.h"
#include "src/numerics/float_traits.h"
#include "src/numerics/rope.h"

namespace dsm {
namespace {

// Tokens whose elements add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainElements = 8192;

/// One head's rotated part. Pair i is (x[2i], x[2i + 1]) when Interleaved, (x[i], x[pairs + i]) otherwise.
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

template <class T>
void rope_tokens(const RopeArgs& args) {
  using A = Compute<T>;
  const std::int64_t tokens = args.x.size(0), heads = args.x.size(1), d = args.x.size(2);
  const std::int64_t pairs = args.inv_freq.size(0), copied = d - 2 * pairs;
  const std::int64_t* positions = args.positions.as<const std::int64_t>();
  const float* inv_freq = args.inv_freq.as<const float>();
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, heads * d));
  parallel_for(0, tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Rotation<A>> rotations(pairs);
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::int64_t i = 0; i < pairs; ++i) {
        const Rotation<A> forward = rope_rotation<A>(rope_angle(positions[token], inv_freq[i]));
        rotations[i] = args.inverse ? inverse(forward) : forward;
      }
      for (std::int64_t head = 0; head < heads; ++head) {
        const T* x = args.x.as<const T>() + token * args.x.stride[0] + head * args.x.stride[1];
        T* y = args.y.as<T>() + token * args.y.stride[0] + head * args.y.stride[1];
        if (x != y) std::copy(x, x + copied, y);
        if (args.interleaved)
          rotate_part<true>(rotations, x + copied, y + copied);
        else
          rotate_part<false>(rotations, x + copied, y + copied);
      }
    }
  });
}

}  // namespace

void rope_cpu(const RopeArgs& args, const Launch&) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { rope_tokens<T>(args); });
}

}  // namespace dsm
