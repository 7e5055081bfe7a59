// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/cuda/reduce/warp.cuh"
#include "src/kv_cache/placing.cuh"
#include "src/numerics/kv_record.h"

namespace dsm {

inline constexpr int kRowThreads = 128;  // of a block that quantises rows

/// How often a warp quantises as many rows as it can at the same time. Several times, where there are many tokens: it
/// finds out at once where all of its rows go, and loads the next ones while it works on some.
inline int rounds_of(const Placing& placing) { return placing.last_tokens ? 4 : 1; }

/// Where a warp's tokens go. Lane i has found out about those of numbers i, i + count, ...: `count` is a power of two.
class WarpEntries {
 public:
  /// All threads of the block must call it. `first`: the warp's first token in the block; `entry_at(place)`: the entry.
  template <class EntryAt>
  __device__ WarpEntries(const Placing& placing, const Pages& cache, int first, int count, int of_block,
                         const EntryAt& entry_at) {
    const int lane = threadIdx.x % cuda::kWarpSize;
    const std::int64_t slot = placing.slot_of(first + (lane & (count - 1)), of_block, cache);
    const KvEntry<std::uint8_t> entry = entry_at(cache[slot >= 0 ? slot : 0]);
    data_ = slot >= 0 ? entry.data : nullptr;
    to_scales_ = entry.scales - entry.data;
  }
  /// Of the warp's i-th token; data is null where it is not stored.
  __device__ KvEntry<std::uint8_t> operator[](int i) const {
    auto* data =
        reinterpret_cast<std::uint8_t*>(__shfl_sync(cuda::kAllLanes, reinterpret_cast<unsigned long long>(data_), i));
    return {data, data + __shfl_sync(cuda::kAllLanes, to_scales_, i)};
  }

 private:
  std::uint8_t* data_;
  long long to_scales_;
};

template <class Record>
__device__ __forceinline__ KvEntry<std::uint8_t> entry_at(const Pages::Place& place) {
  return kv_entry<Record>(place.page, place.page_size, place.entry);
}

}  // namespace dsm
