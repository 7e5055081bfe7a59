// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "dsm/tensor_view.h"

namespace dsm::indexer {

/// The keys that one query sees: [begin, end) within [0, n).
struct KeyRange {
  std::int64_t begin, end;
};

/// Row i's range, cut to [0, n); absent tensors stand for 0 and n.
inline KeyRange key_range(const TensorView& starts, const TensorView& ends, std::int64_t i, std::int64_t n) {
  const std::int64_t begin = starts ? std::clamp<std::int64_t>(starts.as<const std::int32_t>()[i], 0, n) : 0;
  const std::int64_t end = ends ? std::clamp<std::int64_t>(ends.as<const std::int32_t>()[i], 0, n) : n;
  return {begin, std::max(begin, end)};
}

}  // namespace dsm::indexer
