// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/cuda/copy/async.cuh"
#include "src/cuda/ptx/wgmma.cuh"
#include "src/cuda/reduce/warp.cuh"

// Rows from anywhere in global memory become the 64 rows of swizzled tiles (wgmma.cuh), each tile 128 bytes of every
// row. A warpgroup copies; of a warp's 16 rows eight lanes bring 128 bytes side by side.

namespace dsm::cuda {

/// The rows of which this thread copies 16 bytes for each tile, or null for zeros.
struct SourceRows {
  static constexpr int kCount = 4, kOfWarp = 16;

  const void* at[kCount];

  /// Row i of the thread, counted among those of the warp and of all.
  __device__ static int row_of_warp(int i) { return 4 * i + threadIdx.x % kWarpSize / 8; }
  __device__ static int row(int i) { return threadIdx.x % 128 / kWarpSize * kOfWarp + row_of_warp(i); }
};

/// Begins to copy tiles [kBegin, kEnd), of which `tiles` is tile 0. Rows are aligned to 16 bytes; `readable` is any
/// address in global memory.
template <int kBegin, int kEnd>
__device__ __forceinline__ void copy_rows(void* tiles, const SourceRows& rows, const void* readable) {
  constexpr int kTileBytes = 64 * 128;
  const int chunk = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < SourceRows::kCount; ++i) {
    const auto* const row = static_cast<const char*>(rows.at[i] ? rows.at[i] : readable);
#pragma unroll
    for (int tile = kBegin; tile < kEnd; ++tile)
      copy_async<16>(shared_address(tiles) + tile * kTileBytes + swizzled(SourceRows::row(i), chunk),
                     row + tile * 128 + chunk * 16, rows.at[i] ? 16 : 0);
  }
}

}  // namespace dsm::cuda
