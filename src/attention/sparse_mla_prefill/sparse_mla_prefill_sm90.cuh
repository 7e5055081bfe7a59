// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_attend.cuh"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_gather.cuh"

// A thread block works through items, each one query and 64 of its heads; keys come in pairs of blocks of 64. Three
// warpgroups:
//
//   gatherer  takes items in their order, as blocks come to need one, and brings Q and the listed rows into shared
//             memory, ahead of the others and across items: Q by bulk copies, asked for in the L2 while its place is
//             not free, rows 16 bytes a thread
//   first     scores and weights of the first block of a pair, columns   0-255 of the output
//   second    scores and weights of the second block,          columns 256-511 of the output
//
// Weights go to the other warpgroup through shared memory. Of every pair,
//
//   first  multiplies S0 = Q K0ᵀ, O += P0 V0,            O += P1 V1
//   second multiplies             S1 = Q K1ᵀ, O += P0 V0, O += P1 V1
//
// so that the first softmax hides behind S1 and the second behind P0 V0. There is room for these two blocks of keys
// alone: products wait for rows, and rows for the products that free their places. So halves of blocks are asked for in
// the order in which they are let go, the first warpgroup multiplies P0 before it hands it over, and P1 is handed over
// 32 keys at a time. Row maxima are told ahead of the weights: the other warpgroup rescales its output meanwhile. S1
// waits for S0, as the tensor cores would serve both warpgroups alike and finish both late. While scores are
// multiplied, wgmma takes all of shared memory's bandwidth: nothing that is waited for may be read from or stored there
// then. The output is rounded into K1's place, and leaves from there while S0 of the next item is multiplied.

namespace dsm::sparse_prefill_sm90 {

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_mla_prefill_sm90_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CUtensorMap q,
                                   const __grid_constant__ CUtensorMap out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte bytes[];
  Shared<kTiles>& shared = *reinterpret_cast<Shared<kTiles>*>(bytes);
  if (threadIdx.x == 0) shared.init_barriers();
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
    gather<T>(problem, q, shared);
  }
#endif
}

}  // namespace dsm::sparse_prefill_sm90
