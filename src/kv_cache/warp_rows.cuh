// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "src/cuda/reduce/warp.cuh"
#include "src/kv_cache/placing.cuh"
#include "src/numerics/kv_record.h"

// How warps share out rows that are quantised: each has up to 32 neighbouring tokens and makes several of their rows at
// a time. Where tokens are many it reads only rows that have a slot.

namespace dsm {

inline constexpr int kRowThreads = 128;  // of a block
inline constexpr int kRowWarps = kRowThreads / cuda::kWarpSize;

/// How often a warp quantises as many rows as it can at the same time: `most` times, where the tokens are many more
/// than warps.
inline int rounds_of(const Placing& placing, int rows_at_once, int most) {
  constexpr std::int64_t kWarps = 4096;
  const auto rounds = std::bit_floor(static_cast<std::uint64_t>(placing.tokens / (kWarps * rows_at_once)));
  return static_cast<int>(std::clamp<std::uint64_t>(rounds, 1, most));
}

/// A warp's tokens: lane i knows the i-th of them, and where its row goes.
class WarpRows {
 public:
  /// The block's tokens are `count` of each warp, a power of two. `select` leaves out those without a slot; otherwise
  /// rows can be read before slots have arrived.
  __device__ WarpRows(const Placing& placing, const Pages& cache, int count, bool select)
      : first_((std::int64_t{blockIdx.x} * kRowWarps + threadIdx.x / cuda::kWarpSize) * count),
        of_warp_(threadIdx.x % cuda::kWarpSize) {
    const auto tokens = static_cast<int>(min(std::int64_t{count}, max(placing.tokens - first_, std::int64_t{0})));
    named_ = of_warp_ < tokens ? placing.slots[first_ + of_warp_] : -1;
    size_ = tokens;
    if (select) {
      const unsigned all = __ballot_sync(cuda::kAllLanes, cache.valid(named_));
      size_ = __popc(all);
      const bool has_one = of_warp_ < size_;
      of_warp_ = bit_of_rank(all, of_warp_);
      named_ = __shfl_sync(cuda::kAllLanes, named_, of_warp_);
      if (!has_one) named_ = -1;
    }
  }

  /// Finds the entries: all threads of the block must call it. `entry_at(place)`: the entry.
  template <class EntryAt>
  __device__ void place(const Placing& placing, const Pages& cache, int count, const EntryAt& entry_at) {
    const int of_block = threadIdx.x / cuda::kWarpSize * count + (of_warp_ & (count - 1));
    const bool stored = placing.stores(named_, of_block, kRowWarps * count, cache);
    const KvEntry<std::uint8_t> entry = entry_at(cache[stored ? named_ : 0]);
    data_ = stored ? entry.data : nullptr;
    to_scales_ = entry.scales - entry.data;
  }

  __device__ int size() const { return size_; }
  /// The i-th, behind the end any of them.
  __device__ std::int64_t token(int i) const {
    return first_ + __shfl_sync(cuda::kAllLanes, of_warp_, min(i, size_ - 1));
  }
  /// Its data is null if it is not stored, and behind the end.
  __device__ KvEntry<std::uint8_t> entry(int i) const {
    auto* data =
        reinterpret_cast<std::uint8_t*>(__shfl_sync(cuda::kAllLanes, reinterpret_cast<unsigned long long>(data_), i));
    return {data, data + __shfl_sync(cuda::kAllLanes, to_scales_, i)};
  }

 private:
  /// The place of the bit of ones that has `rank` ones below it; if there is none, any.
  static __device__ int bit_of_rank(unsigned ones, int rank) {
    int at = 0;
#pragma unroll
    for (int width = cuda::kWarpSize / 2; width > 0; width /= 2) {
      const int below = __popc(ones >> at & ((1u << width) - 1));
      if (rank >= below) rank -= below, at += width;
    }
    return at;
  }

  std::int64_t first_, named_;
  int of_warp_, size_;
  std::uint8_t* data_;
  long long to_scales_;
};

template <class Record>
__device__ __forceinline__ KvEntry<std::uint8_t> entry_at(const Pages::Place& place) {
  return kv_entry<Record>(place.page, place.page_size, place.entry);
}

}  // namespace dsm
