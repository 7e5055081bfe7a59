// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/gathered_cuda.h"

#include <algorithm>

namespace dsm::attention {
namespace {

// Of a large GPU, elsewhere merely not the best: its processors, and in tiles of keys what costs beginning and ending a
// thread block, adding up its groups, and the merging kernel: so many tiles, and one for so many parts.
constexpr std::int64_t kProcessors = 132;
constexpr std::int64_t kOverheadTiles = 8, kGroupingTiles = 1, kMergingTiles = 2, kSplitsPerTile = 32,
                       kPartsPerTile = 160;
constexpr std::int64_t kInvariantSplits = 8;

std::size_t element_bytes(DType dtype) { return dtype == DType::float64 ? sizeof(double) : sizeof(float); }

}  // namespace

GatheredWork::Plan GatheredWork::plan() const {
  const bool few = rows <= kMostOfFew;
  const std::int64_t rows_at_once = few ? kFewRows : kManyRows;
  const std::int64_t row_blocks = units * ((rows + rows_at_once - 1) / rows_at_once);
  const int at_once = few ? kFewBlocks : 1, most_groups = grouped ? at_once : 1;
  const auto slots = [&](int groups) { return kProcessors * at_once / groups; };
  if (batch_invariant) {  // a request of many blocks needs no splits, whose outputs would take much memory
    const std::int64_t of_request = std::max<std::int64_t>(row_blocks / std::max<std::int64_t>(requests, 1), 1);
    return {static_cast<int>(std::clamp<std::int64_t>(slots(most_groups) / of_request, 1, kInvariantSplits)),
            most_groups};
  }
  const std::int64_t tiles = (keys + kTileKeys - 1) / kTileKeys;
  const auto cost = [&](const Plan& plan) {
    const std::int64_t waves = (row_blocks * plan.splits + slots(plan.groups) - 1) / slots(plan.groups);
    const std::int64_t parts = plan.splits * plan.groups;
    return waves * ((tiles + parts - 1) / parts + kOverheadTiles + (plan.groups > 1 ? kGroupingTiles : 0)) +
           (plan.splits > 1 ? kMergingTiles + plan.splits / kSplitsPerTile + row_blocks * plan.splits / kPartsPerTile
                            : 0);
  };
  Plan best{1, 1};
  if (row_blocks >= 8 * slots(1)) return best;
  std::int64_t least = cost(best);
  for (int groups = most_groups; groups > 0; groups = groups > 1 ? 1 : 0) {
    for (int splits = 1; splits <= std::clamp<std::int64_t>(tiles, 1, slots(groups)); ++splits) {
      const std::int64_t its = cost({splits, groups});
      if (its < least) least = its, best = {splits, groups};
    }
  }
  return best;
}

std::size_t GatheredWork::workspace_bytes() const {
  const std::int64_t count = splits();
  if (count == 1) return 0;
  return static_cast<std::size_t>(count * units * rows * (part_stride() + 2)) * element_bytes(dtype);
}

}  // namespace dsm::attention
