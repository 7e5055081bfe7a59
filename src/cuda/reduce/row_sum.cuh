// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/cuda/reduce/warp.cuh"

namespace dsm::cuda {

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
