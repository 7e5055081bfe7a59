// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

namespace dsm::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

/// Sum over groups of `lanes` neighbouring lanes (a power of two up to 32), the same bits in each of them. All lanes of
/// the warp must call it.
template <class T>
__device__ __forceinline__ T lane_group_sum(T value, int lanes = kWarpSize) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

/// Sums over the threads of one row of a block, called over and over by all threads of the block. A row is blockDim.x
/// threads: a power of two up to 32, or any multiple of 32 with blockDim.y == 1.
template <class T>
class RowSum {
 public:
  /// Storage in shared memory; two halves in turn, so that one barrier per sum is enough.
  using Storage = T[2][kWarpSize];

  __device__ explicit RowSum(Storage& storage) : storage_(storage) {}

  /// The sum, the same bits in every thread of the row.
  __device__ T operator()(T value) {
    if (blockDim.x <= kWarpSize) return lane_group_sum(value, blockDim.x);
    value = lane_group_sum(value);
    T* warps = storage_[turn_];
    turn_ ^= 1;
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) warps[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    return lane_group_sum(lane < blockDim.x / kWarpSize ? warps[lane] : T(0));
  }

 private:
  Storage& storage_;
  int turn_ = 0;
};

}  // namespace dsm::cuda
