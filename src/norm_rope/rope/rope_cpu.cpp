// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>

#include "src/core/parallel_for.h"
#include "src/cpu/visit_dtype.h"
#include "src/norm_rope/rope/rope.h"
#include "src/norm_rope/rotate_cpu.h"

namespace dsm {
namespace {

// Tokens whose elements add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainElements = 8192;

template <class T>
void rope_tokens(const RopeArgs& args) {
  const std::int64_t tokens = args.x.size(0), heads = args.x.size(1), d = args.x.size(2);
  const std::int64_t copied = d - 2 * args.inv_freq.size(0);
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, heads * d));
  parallel_for(0, tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    TokenRotations<Compute<T>> rotations(args.positions, args.inv_freq, args.inverse);
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::int64_t head = 0; head < heads; ++head) {
        const T* x = args.x.as<const T>() + token * args.x.stride[0] + head * args.x.stride[1];
        T* y = args.y.as<T>() + token * args.y.stride[0] + head * args.y.stride[1];
        if (x != y) std::copy(x, x + copied, y);
        if (args.interleaved)
          rotate_part<true>(rotations.of(token), x + copied, y + copied);
        else
          rotate_part<false>(rotations.of(token), x + copied, y + copied);
      }
    }
  });
}

}  // namespace

void rope_cpu(const RopeArgs& args, const Launch&) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() { rope_tokens<T>(args); });
}

}  // namespace dsm
