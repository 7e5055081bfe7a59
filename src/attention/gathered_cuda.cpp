// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/gathered_cuda.h"

#include <algorithm>

namespace dsm::attention {
namespace {

// Of a large GPU, elsewhere merely not the best: its processors, what beginning and ending a thread block costs in
// tiles of keys, and how many splits cost the merging kernel as much as a tile.
constexpr std::int64_t kProcessors = 132;
constexpr std::int64_t kOverheadTiles = 8, kSplitsPerTile = 16;
constexpr std::int64_t kInvariantSplits = 8;

std::size_t element_bytes(DType dtype) { return dtype == DType::float64 ? sizeof(double) : sizeof(float); }

}  // namespace

int GatheredWork::splits() const {
  const bool few = rows <= kMostOfFew;
  const std::int64_t slots = kProcessors * (few ? blocks : 1);
  const std::int64_t rows_at_once = few ? kFewRows : kManyRows;
  const std::int64_t blocks = units * ((rows + rows_at_once - 1) / rows_at_once);
  if (batch_invariant) {  // a request of many blocks needs no splits, whose outputs would take much memory
    const std::int64_t of_request = std::max<std::int64_t>(blocks / std::max<std::int64_t>(requests, 1), 1);
    return static_cast<int>(std::clamp<std::int64_t>(slots / of_request, 1, kInvariantSplits));
  }
  const std::int64_t tiles = (keys + kTileKeys - 1) / kTileKeys;
  const auto cost = [&](std::int64_t count) {
    const std::int64_t waves = (blocks * count + slots - 1) / slots;
    return waves * ((tiles + count - 1) / count + kOverheadTiles) + (count > 1 ? 1 + count / kSplitsPerTile : 0);
  };
  std::int64_t best = 1;
  if (blocks >= 8 * slots) return 1;
  for (std::int64_t count = 2; count <= std::min(tiles, slots); ++count)
    if (cost(count) < cost(best)) best = count;
  return static_cast<int>(best);
}

std::size_t GatheredWork::workspace_bytes() const {
  const std::int64_t count = splits();
  if (count == 1) return 0;
  return static_cast<std::size_t>(count * units * rows * (part_stride() + 2)) * element_bytes(dtype);
}

}  // namespace dsm::attention
