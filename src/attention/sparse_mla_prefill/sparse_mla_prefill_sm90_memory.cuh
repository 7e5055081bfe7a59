// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90.h"
#include "src/cuda/ptx/barrier.cuh"

namespace dsm::sparse_prefill_sm90 {

using namespace cuda;

constexpr int kHeads = 64;  // of an item, but where there are few
constexpr int kFewHeads = 16;
constexpr int kKeys = 64;  // of a block
constexpr int kThreads = 384;
constexpr int kConsumers = 256;            // threads that meet at a named barrier
constexpr float kLowest = -3.4028235e38f;  // what -inf may be subtracted from
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// Rows of 64 elements, swizzled (wgmma.cuh).
template <int kRows>
struct alignas(1024) TileOf {
  std::byte at[kRows * 128];
};
using Tile = TileOf<64>;

/// The halves of a row of tiles, columns 0-255 and the others, are refilled by themselves, and multiplied in groups of
/// two tiles as these arrive. A ninth tile arrives with the last group of K0 and with group 1 of K1.
enum Half { kLeft, kRight };

/// Q comes in boxes of so many tiles, as each copy costs who asks for it some 100 cycles.
template <int kTiles>
constexpr int kQueryBox = kTiles % 3 == 0 ? 3 : 4;

/// A query and kHeads of its heads, or kFewHeads; `pairs` of key blocks, at least one, so that a query without keys is
/// no exception.
struct Item {
  std::int32_t query, head_tile, pairs;  // query < 0: there are no more
};

/// By one thread of a query's head.
__device__ __forceinline__ void store_statistics(const Problem& problem, int query, int head, float most, float lse) {
  if (problem.max_logits) problem.max_logits[static_cast<std::int64_t>(query) * problem.h_q + head] = most;
  problem.lse[query * problem.lse_query + head * problem.lse_head] = lse;
}

/// What the warpgroups tell each other about a row; sum and top at the end of an item.
struct RowState {
  float reference, sum, top;
};

/// What comes from the gatherer, and tells it what may come; the first members of the shared memory.
template <int kTiles, int kItemHeads>  // kTiles of a row
struct Gathered {
  TileOf<kItemHeads> q[kTiles];
  Tile k[2][9];                          // the ninth belongs to K1's left and K0's right half
  Item item[2];                          // for either warpgroup, told with the first valid keys
  std::int32_t taken[2];                 // in turn
  alignas(8) std::uint16_t valid[2][4];  // bits: whether a key of the block is one
  MBarrier q_ready, q_free;
  MBarrier k_ready[2][4], k_free[2][2], valid_ready[2];  // [block][group], [block][half], [block]

  /// By one thread. A warp lets a half of a block of keys go for its warpgroup, and Q for itself.
  __device__ void init_barriers() {
    q_ready.init(1);
    q_free.init(8);
    for (int i = 0; i < 2; ++i) {
      valid_ready[i].init(4);
      for (MBarrier& group : k_ready[i]) group.init(128);
      for (MBarrier& half : k_free[i]) half.init(4);
    }
    fence_barrier_init();
  }
};

template <int kTiles>
struct Shared : Gathered<kTiles, kHeads> {  // K1's ninth tile holds P1 once S1 is there
  Tile p0;
  RowState first[kHeads], second[kHeads];
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
