// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_pipeline.h>

#include "src/cuda/copy/pack.cuh"

namespace dsm::cuda {

// Packs fetched before they are needed, without registers: each thread has slots in shared memory that only it touches,
// so no barrier is needed. A slot is read before the next fetch into it begins.

/// Begins to copy a pack into a slot; one that is not of 16 bytes is there at once.
template <int N, class T>
__device__ __forceinline__ void fetch_pack(Pack<T, N>* slot, const T* from) {
  if constexpr (N * sizeof(T) == kPackBytes)
    __pipeline_memcpy_async(slot, from, kPackBytes);
  else
    *slot = load_pack<N>(from);
}

/// Ends a group: the packs that this thread has begun to fetch since the last group.
__device__ __forceinline__ void end_fetch_group() { __pipeline_commit(); }

/// Waits for all groups of this thread but the `kLater` last ones.
template <int kLater>
__device__ __forceinline__ void await_fetch_groups() {
  __pipeline_wait_prior(kLater);
  asm volatile("" ::: "memory");  // the wait itself does not keep the compiler from reading the slots before it
}

}  // namespace dsm::cuda
