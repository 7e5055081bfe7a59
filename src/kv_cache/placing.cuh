// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <utility>

#include "dsm/launch.h"
#include "src/cuda/launch/launch.h"
#include "src/cuda/ptx/barrier.cuh"
#include "src/kv_cache/pages.cuh"
#include "src/kv_cache/placements.h"

namespace dsm {

/// Which tokens are stored, for kernels.
struct Placing {
  const std::int64_t* slots;  // one for each token
  std::int64_t tokens;
  /// [rows of the cache] the last token that names a row, where one does; null where there are few tokens.
  const std::int32_t* last_tokens;

  /// Launches the kernel that makes the marks in the workspace.
  Placing(const char* operation, const TensorView& slots, const TensorView& cache, const Launch& launch);

  static constexpr int kMostUnmarked = 32;  // tokens of a block, where there are no marks

  /// Whether tokens of this block, of which it has `of_block`, are stored: that their slots are rows which no later
  /// token names. All threads of the block must call it, each for a token. The last block may have fewer.
  __device__ __forceinline__ bool stores(std::int64_t named, int token_of_block, int of_block,
                                         const Pages& pages) const {
    const std::int64_t first = std::int64_t{blockIdx.x} * of_block;
    if (last_tokens) {
      cuda::await_previous_kernel();
      return pages.valid(named) && last_tokens[named] == first + token_of_block;
    }

    __shared__ std::int64_t block_slots[kMostUnmarked];
    __shared__ unsigned overtaken;  // a bit per token
    if (threadIdx.x == 0) overtaken = 0;
    if (threadIdx.x < of_block) block_slots[threadIdx.x] = slot(first + threadIdx.x);
    __syncthreads();
    unsigned mine = 0;
    for (std::int64_t later = first + 1 + threadIdx.x; later < tokens; later += blockDim.x) {
      const std::int64_t other = slots[later];
#pragma unroll 4
      for (int i = 0; i < of_block; ++i)
        if (other == block_slots[i] && first + i < later) mine |= 1u << i;
    }
    if (mine) atomicOr(&overtaken, mine);
    __syncthreads();
    return pages.valid(named) && !(overtaken >> token_of_block & 1);
  }
  /// What slots names for a token; -1 behind the end.
  __device__ std::int64_t slot(std::int64_t token) const { return token < tokens ? slots[token] : -1; }
  /// That of a token of this block, as above; -1 if it is not stored.
  __device__ __forceinline__ std::int64_t slot_of(int token_of_block, int of_block, const Pages& pages) const {
    const std::int64_t named = slot(std::int64_t{blockIdx.x} * of_block + token_of_block);
    return stores(named, token_of_block, of_block, pages) ? named : -1;
  }
};

/// Launches a kernel that takes the placing. Where there are marks it starts while they are being made: it may read
/// its other inputs before `stores`, but write nothing.
template <class... Parameters, class... Arguments>
void launch_placing(const char* operation, const Placing& placing, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    const Launch& on, Arguments&&... arguments) {
  if (placing.last_tokens)
    cuda::launch_dependent(operation, kernel, grid, block, 0, on, placing, std::forward<Arguments>(arguments)...);
  else
    cuda::launch(operation, kernel, grid, block, 0, on, placing, std::forward<Arguments>(arguments)...);
}

}  // namespace dsm
