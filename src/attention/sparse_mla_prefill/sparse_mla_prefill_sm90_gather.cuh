// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_memory.cuh"
#include "src/cuda/copy/swizzled_rows.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"
#include "src/cuda/reduce/warp.cuh"

namespace dsm::sparse_prefill_sm90 {

using namespace cuda;

template <class T, int kTiles, int kItemHeads>
__device__ void gather(const Problem& problem, const CUtensorMap& queries, Gathered<kTiles, kItemHeads>& shared) {
  const int warp = threadIdx.x % 128 / kWarpSize, lane = threadIdx.x % kWarpSize;
  const T* const kv = static_cast<const T*>(problem.kv);
  constexpr int kBox = kQueryBox<kTiles>;
  std::uint32_t parity = 1, q_parity = 1;  // of the phase before
  // The first thread takes items, and says which.
  const bool first = threadIdx.x % 128 == 0;
  const auto next_item = [&](std::int32_t taken) {
    q_parity ^= 1;
    if (first) shared.taken[q_parity] = taken;
    named_sync(kTaken, 128);
    return shared.taken[q_parity];
  };
  for (std::int32_t number = blockIdx.x, taken = 0; number < problem.items; number = next_item(taken)) {
    const std::int32_t query = number / problem.head_tiles, first_head = number % problem.head_tiles * kItemHeads;
    const int keys = problem.topk_length ? min(max(problem.topk_length[query], 0), problem.topk) : problem.topk;
    const int pairs = max((keys + 2 * kKeys - 1) / (2 * kKeys), 1);
    const std::int32_t* const list = problem.indices + query * problem.indices_token;
    // Two head tiles of a query are at work at about the same time. One of them has neighbouring pairs change places,
    // so that each finds every other pair in the L2, where the other has brought it.
    const int swaps = number % problem.head_tiles % 2;
    // Lane l's index: of row 16 warp + l % 16 in block l / 16 of the pair.
    const auto index_of = [&](int pair) {
      if ((pair ^ swaps) < pairs) pair ^= swaps;
      const int at = pair * 2 * kKeys + lane / 16 * kKeys + 16 * warp + lane % 16;
      return at < keys ? list[at] : -1;
    };
    std::int32_t ahead = index_of(0);
    // Q comes from the device's memory, once, and its place is not free yet.
    if (first) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += kBox) tensor_prefetch_l2(queries, 0, first_head, tile, query);
    }
    // By one thread.
    const auto fetch_query = [&] {
      shared.q_free.wait(q_parity);
      shared.q_ready.arrive_expecting(sizeof(shared.q));
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += kBox)
        tensor_load(&shared.q[tile], queries, 0, first_head, tile, query, shared.q_ready, L2Hint::kEvictFirst);
    };
    for (int pair = 0; pair < pairs; ++pair, parity ^= 1) {
      const std::int32_t index = ahead;
      ahead = index_of(pair + 1);
      const bool key = 0 <= index && index < problem.s_kv;
      const std::uint32_t valid = __ballot_sync(kAllLanes, key);
      const auto key_rows = [&](int block) {
        SourceRows rows;
#pragma unroll
        for (int i = 0; i < SourceRows::kCount; ++i) {
          const int source = SourceRows::kOfWarp * block + SourceRows::row_of_warp(i);
          const std::int32_t row = __shfl_sync(kAllLanes, index, source);
          rows.at[i] = valid >> source & 1 ? kv + row * problem.kv_row : nullptr;
        }
        return rows;
      };
      const auto tell_valid = [&](int block) {
        if (lane != 0) return;
        if (first && pair == 0) shared.item[block] = {query, first_head / kItemHeads, pairs};
        shared.valid[block][warp] = static_cast<std::uint16_t>(valid >> 16 * block);
        shared.valid_ready[block].arrive();
      };

      if (pair + 1 == pairs && first) taken = gridDim.x + atomicAdd(problem.taken, 1);
      const SourceRows rows0 = key_rows(0);
      shared.k_free[0][kLeft].wait(parity);
      tell_valid(0);
      copy_rows<0, 2>(shared.k[0], rows0, problem.q);
      shared.k_ready[0][0].arrive_after_copies();
      copy_rows<2, 4>(shared.k[0], rows0, problem.q);
      shared.k_ready[0][1].arrive_after_copies();
      if (pair == 0 && first) fetch_query();
      __syncwarp();
      shared.k_free[0][kRight].wait(parity);
      copy_rows<4, 6>(shared.k[0], rows0, problem.q);
      shared.k_ready[0][2].arrive_after_copies();
      copy_rows<6, kTiles>(shared.k[0], rows0, problem.q);
      shared.k_ready[0][3].arrive_after_copies();

      const SourceRows rows1 = key_rows(1);
      shared.k_free[1][kLeft].wait(parity);
      tell_valid(1);
      copy_rows<0, 2>(shared.k[1], rows1, problem.q);
      shared.k_ready[1][0].arrive_after_copies();
      copy_rows<2, 4>(shared.k[1], rows1, problem.q);
      copy_rows<8, kTiles>(shared.k[1], rows1, problem.q);
      shared.k_ready[1][1].arrive_after_copies();
      shared.k_free[1][kRight].wait(parity);
      copy_rows<4, 6>(shared.k[1], rows1, problem.q);
      shared.k_ready[1][2].arrive_after_copies();
      copy_rows<6, 8>(shared.k[1], rows1, problem.q);
      shared.k_ready[1][3].arrive_after_copies();
    }
  }
  const auto tell_end = [&](int block) {
    if (first) shared.item[block].query = -1;
    if (lane == 0) shared.valid_ready[block].arrive();
  };
  shared.k_free[0][kLeft].wait(parity);
  tell_end(0);
  shared.k_free[1][kLeft].wait(parity);
  tell_end(1);
}

}  // namespace dsm::sparse_prefill_sm90
