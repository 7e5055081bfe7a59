// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsm/dtype.h"

namespace dsm::attention {

/// What decides how portable CUDA splits a call: shapes alone. A unit is a list of keys with the query rows that share
/// it; its keys may be split between thread blocks, whose results another kernel adds up.
struct GatheredWork {
  /// How a unit's keys are shared.
  struct Plan {
    int splits;  ///< of a unit's keys between blocks
    int groups;  ///< of a block's threads, which split its keys once more
  };

  std::int64_t requests;
  std::int64_t units;  ///< of all requests, each with as many
  std::int64_t rows;   ///< query rows of a unit
  std::int64_t keys;   ///< the most that a unit can have
  std::int64_t d_v;
  DType dtype;                   ///< of the queries
  bool grouped = false;          ///< whether groups of one block's threads can be all these
  bool batch_invariant = false;  ///< units are split in the same way, whatever the number of requests and of keys

  /// The one that takes the least time on a large GPU, by a count of tiles; the same everywhere.
  Plan plan() const;
  int splits() const { return plan().splits; }
  /// Of the parts' outputs and softmax states; 0 without a split.
  std::size_t workspace_bytes() const;

  /// Elements of a part's output row: d_v, padded for 16-byte accesses.
  std::int64_t part_stride() const { return (d_v + 3) / 4 * 4; }
};

/// Query rows that a thread block works on: one or four tiles of the matrix product; and of a unit with up to how many
/// the fewer, in more blocks.
inline constexpr int kFewRows = 16, kManyRows = 64, kMostOfFew = 32;
/// Blocks of few rows that run at the same time on a processor, or groups of threads in a block.
inline constexpr int kFewBlocks = 2;
/// The largest d_qk and d_v of the matrix products.
inline constexpr int kMostColumns = 576, kMostValues = 512;
/// Keys that a thread block works on at a time.
inline constexpr int kTileKeys = 32;

}  // namespace dsm::attention
