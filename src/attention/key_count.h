// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/core/checks.h"

namespace dsm::attention {

/// Kernels count the keys of a list in int32, rounded up to whole blocks.
inline constexpr std::int64_t kMostKeys = std::int64_t{1} << 30;

inline void check_key_count(const Check& check, const char* argument, std::int64_t keys) {
  check.that(keys <= kMostKeys, argument, "of at most 2^30 keys a list", keys);
}

}  // namespace dsm::attention
