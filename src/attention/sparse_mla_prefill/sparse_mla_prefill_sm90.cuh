// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_attend.cuh"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_gather.cuh"

// A thread block works through items, each one query and 64 of its heads; keys come in pairs of blocks of 64. Three
// warpgroups:
//
//   gatherer  takes items in their order, as blocks come to need one, and copies Q and the listed rows into shared
//             memory, ahead of the others and across items
//   first     scores and weights of the first block of a pair, columns   0-255 of the output
//   second    scores and weights of the second block,          columns 256-511 of the output
//
// Weights go to the other warpgroup through shared memory. The tensor cores see, of every pair,
//
//   S0 = Q K0ᵀ (first) | S1 = Q K1ᵀ (second) | O += P0 V0 (both) | O += P1 V1 (both)
//
// so that the first softmax hides behind S1 and the second behind P0 V0. Named barriers keep this order, as the tensor
// cores would serve both warpgroups alike and finish both products late. While scores are multiplied, wgmma takes all
// of shared memory's bandwidth: nothing that is waited for may be read from or stored there then. The output is rounded
// into K1's place, and leaves from there while S0 of the next item is multiplied.

namespace dsm::sparse_prefill_sm90 {

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_mla_prefill_sm90_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CUtensorMap out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte bytes[];
  Shared<kTiles>& shared = *reinterpret_cast<Shared<kTiles>*>(bytes);
  if (threadIdx.x == 0) {
    shared.q_free.init(8);
    for (int i = 0; i < 2; ++i) {
      shared.q_ready[i].init(128);
      shared.valid_ready[i].init(4);
      for (MBarrier& group : shared.k_ready[i]) group.init(128);
      for (MBarrier& half : shared.k_free[i]) half.init(4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    take_registers<216>();
    attend_first<T>(problem, out, shared);
  } else if (warpgroup == 1) {
    take_registers<216>();
    attend_second<T>(problem, out, shared);
  } else {
    give_registers<72>();
    gather<T>(problem, shared);
  }
#endif
}

}  // namespace dsm::sparse_prefill_sm90
