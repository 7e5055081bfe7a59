// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/core/checks.h"

namespace dsm {

/// What every operator wants that rotates the last dimensions of heads.
inline void check_rotated(const Check& check, const char* argument, const TensorView& x, const TensorView& positions,
                          const TensorView& inv_freq) {
  check.tensor(argument, x, "[tokens, heads, d]", {Check::kAny, Check::kAny, Check::kAny}, kFloating);
  check.unit_last_stride(argument, x);
  const std::int64_t tokens = x.size(0), d = x.size(2);
  check.contiguous("positions", positions, "[tokens]", {tokens}, {DType::int64});
  check.contiguous("inv_freq", inv_freq, "[d_rope / 2]", {Check::kAny}, {DType::float32});
  check.that(2 * inv_freq.size(0) <= d, "inv_freq", "at most d / 2 = " + std::to_string(d / 2) + " long",
             inv_freq.size(0));
  check.on_device(x.device, {{"positions", positions}, {"inv_freq", inv_freq}});
}

}  // namespace dsm
