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

/// Where the rows of the next tiles are, in shared memory. Warps find the rows of a tile in turn, so that each can read
/// what the lists say long before.
class TileRows {
 public:
  /// The rows of a tile. Where there is no key, they are somewhere, at an address as aligned as others.
  struct Tile {
    const std::uint8_t* data[kTileKeys];
    const std::uint8_t* scales[kTileKeys];  ///< of formats that keep them elsewhere
    std::uint32_t valid;                    ///< bit i: key i exists
  };
  using Storage = Tile[4];

  /// The tiles from `first` on.
  __device__ TileRows(const GatheredAttention& p, const Unit& unit, int first, Storage& storage)
      : p_(p), unit_(unit), storage_(storage), next_(first + threadIdx.x / cuda::kWarpSize) {
    fetched_ = unit_.fetch(p_, next_, threadIdx.x % cuda::kWarpSize);
  }

  /// By all threads, for each tile once, in order. Before others read the rows, a barrier; before the rows of the
  /// fourth tile from there are found, another.
  __device__ void find(int tile) {
    if (tile != next_) return;
    const int key = threadIdx.x % cuda::kWarpSize;
    const KeyRow row = unit_.row(p_, tile, key, fetched_);
    const bool exists = row.data != nullptr;
    Tile& found = storage_[tile % 4];
    found.data[key] = exists ? row.data : nowhere();
    found.scales[key] = exists ? row.scales : nowhere();
    const std::uint32_t valid = __ballot_sync(cuda::kAllLanes, exists);
    if (key == 0) found.valid = valid;
    next_ += static_cast<int>(blockDim.x) / cuda::kWarpSize;
    fetched_ = unit_.fetch(p_, next_, key);
  }

  __device__ const Tile& of(int tile) const { return storage_[tile % 4]; }

 private:
  __device__ const std::uint8_t* nowhere() const {
    return reinterpret_cast<const std::uint8_t*>(reinterpret_cast<std::uintptr_t>(p_.q) & ~std::uintptr_t{15});
  }

  const GatheredAttention& p_;
  const Unit& unit_;
  Storage& storage_;
  int next_;
  std::int32_t fetched_;
};

#endif

}  // namespace dsm::attention
