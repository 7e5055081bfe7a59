// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90.h"
#include "src/cuda/ptx/barrier.cuh"

namespace dsm::sparse_prefill_sm90 {

using namespace cuda;

constexpr int kHeads = 64;  // of an item
constexpr int kKeys = 64;   // of a block
constexpr int kThreads = 384;
constexpr int kConsumers = 256;            // threads that meet at a named barrier
constexpr float kLowest = -3.4028235e38f;  // what -inf may be subtracted from
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// 64 rows of 64 elements, swizzled (wgmma.cuh).
struct alignas(1024) Tile {
  std::byte at[8192];
};

/// The halves of a row of tiles, columns 0-255 and the others, are refilled by themselves, and multiplied in groups of
/// two tiles as these arrive. A ninth tile arrives with the last group of K0 and with group 1 of K1.
enum Half { kLeft, kRight };

/// A query and 64 of its heads; `pairs` of key blocks, at least one, so that a query without keys is no exception.
struct Item {
  std::int32_t query, head_tile, pairs;  // query < 0: there are no more
};

/// What the warpgroups tell each other about a row; sum and top at the end of an item.
struct RowState {
  float reference, sum, top;
};

template <int kTiles>  // of a row
struct Shared {
  Tile q[kTiles];
  Tile k[2][9];  // the ninth belongs to K1's left and K0's right half; K1's holds P1 once S1 is there
  Tile p0;
  RowState first[kHeads], second[kHeads];
  Item item[2];                          // for either warpgroup, told with the first valid keys
  std::int32_t taken[2];                 // in turn
  alignas(8) std::uint16_t valid[2][4];  // bits: whether a key of the block is one
  MBarrier q_ready[2], q_free;
  MBarrier k_ready[2][4], k_free[2][2], valid_ready[2];  // [block][group], [block][half], [block]
};

/// Named barriers: what a warpgroup has got to.
enum : int {
  kFirstScored = 1,
  kFirstRaised,   // its references are told
  kFirstWeighed,  // and its weights stored
  kSecondRaised,
  kSecondBegun,  // the weights of 32 keys stored
  kSecondWeighed,
  kFirstDone,
  kSecondDone,
  kTaken
};

}  // namespace dsm::sparse_prefill_sm90
