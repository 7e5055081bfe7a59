// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/gathered_cuda.cuh"
#include "src/cuda/reduce/warp.cuh"

// The rows of keys that a block of threads works on, found in the lists tile by tile.
namespace dsm::attention {

#ifdef __CUDACC__

/// The thread's number, asked for anew: what follows from it is not kept in registers meanwhile.
__device__ __forceinline__ int thread_again() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

/// What is copied where there is no key: zeros, as many as a row of 576 16-bit numbers has bytes.
static __device__ const uint4 no_row[72] = {};

/// The rows of a tile of keys; no_row where there is no key.
struct RowsOfTile {
  const std::uint8_t* data[kTileKeys];
  const std::uint8_t* scales[kTileKeys];  ///< of formats that keep them elsewhere
  std::uint32_t valid;                    ///< bit i: key i exists
};

/// Where the rows of the next tiles are, in shared memory. Warps find the rows of a tile in turn, so that each can read
/// what the lists say long before.
template <int kWarps>
class TileRows {
 public:
  static constexpr int kTiles = 4;
  using Storage = RowsOfTile[kTiles];

  /// The tiles from `first` on.
  __device__ TileRows(const GatheredAttention& p, const Unit& unit, int first, Storage& storage)
      : p_(p), unit_(unit), storage_(storage) {
    const int turn = (static_cast<int>(threadIdx.x) / cuda::kWarpSize - first) & (kWarps - 1);
    fetched_ = unit_.fetch(p_, first + turn, threadIdx.x % cuda::kWarpSize);
  }

  /// By all threads, for each tile once, in order. Before others read the rows, a barrier; before those of the tile
  /// kTiles later are found, another.
  __device__ void find(int tile) {
    if (tile % kWarps != static_cast<int>(threadIdx.x) / cuda::kWarpSize) return;
    const int key = threadIdx.x % cuda::kWarpSize;
    const KeyRow row = unit_.row(p_, tile, key, fetched_);
    const bool exists = row.data != nullptr;
    RowsOfTile& found = storage_[tile % kTiles];
    const auto* const zeros = reinterpret_cast<const std::uint8_t*>(no_row);
    found.data[key] = exists ? row.data : zeros;
    found.scales[key] = exists ? row.scales : zeros;
    const std::uint32_t valid = __ballot_sync(cuda::kAllLanes, exists);
    if (key == 0) found.valid = valid;
    fetched_ = unit_.fetch(p_, tile + kWarps, key);
  }

  __device__ const RowsOfTile& of(int tile) const { return storage_[tile % kTiles]; }

 private:
  const GatheredAttention& p_;
  const Unit& unit_;
  Storage& storage_;
  std::int32_t fetched_;
};

#endif

}  // namespace dsm::attention
