// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_memory.cuh"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"
#include "src/cuda/ptx/wgmma.cuh"
#include "src/cuda/reduce/warp.cuh"

// What a warpgroup does with 64 rows: products, softmax, output.

namespace dsm::sparse_prefill_sm90 {

using namespace cuda;

/// The same pointer. Descriptors are made where they are used: the compiler would keep all of them across the loop.
__device__ __forceinline__ const Tile* here(const Tile* tile) {
  asm volatile("" : "+l"(tile));
  return tile;
}

template <class T, int kBegin, int kEnd>
__device__ __forceinline__ void multiply_tiles(float (&s)[32], const Tile* q, const Tile* k, bool accumulate) {
  const std::uint64_t a = k_major(here(q)), b = k_major(here(k));
#pragma unroll
  for (int tile = kBegin; tile < kEnd; ++tile)
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const std::uint32_t at = tile * sizeof(Tile) + 32 * step;
      wgmma_m64n64<T, Major::k>(s, advanced(a, at), advanced(b, at), accumulate || tile > kBegin || step > 0);
    }
}

/// O += P V, or O = P V, P in shared memory or in registers, V four tiles side by side; keys in steps of 16.
template <class T, int kBegin = 0, int kEnd = 4>
__device__ __forceinline__ void weigh_values(float (&o)[128], const Tile& p, const Tile* v, bool accumulate) {
  const std::uint64_t a = k_major(here(&p)), b = n_major(here(v), sizeof(Tile));
#pragma unroll
  for (int step = kBegin; step < kEnd; ++step)
    wgmma_m64n256<T, Major::n>(o, advanced(a, 32 * step), advanced(b, 2048 * step), accumulate || step > 0);
}
template <class T, int kBegin = 0, int kEnd = 4>
__device__ __forceinline__ void weigh_values(float (&o)[128], const std::uint32_t (&p)[4][4], const Tile* v,
                                             bool accumulate) {
  const std::uint64_t b = n_major(here(v), sizeof(Tile));
#pragma unroll
  for (int step = kBegin; step < kEnd; ++step)
    wgmma_m64n256<T, Major::n>(o, p[step], advanced(b, 2048 * step), accumulate || step > 0);
}

/// What a thread knows of its two rows. Scores are in units of log 2; the weight of a key is 2^(score - reference), and
/// sum the sum of those this thread has formed. Both warpgroups go through the same references.
struct Rows {
  float reference[2] = {kLowest, kLowest}, sum[2] = {}, top[2] = {-INFINITY, -INFINITY};

  /// The reference is a row's largest score so far, so that the largest weight is 1 and loses nothing where weights are
  /// rounded. `of`: the largest of new scores.
  __device__ void raise(const float (&of)[2], float scale, float (&factor)[2]) {
    float to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], of[i]);
      to[i] = fmaxf(reference[i], of[i] * scale);
    }
    move(to, factor);
  }
  /// Changes the reference: what has been summed up is to be rescaled by the factors.
  __device__ void move(const float (&to)[2], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = power_of_two(reference[i] - to[i]);
      sum[i] = __fmul_rn(sum[i], factor[i]);
      reference[i] = to[i];
    }
  }
};

/// By the factors of the two rows; eight rows at a time, where any of a warp's has changed.
__device__ __forceinline__ void rescale(float (&o)[128], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!__any_sync(kAllLanes, factor[i] != 1)) continue;
#pragma unroll
    for (int j = 0; j < 32; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) o[4 * j + 2 * i + e] *= factor[i];
  }
}

/// Takes out what is no key, and finds the rows' largest scores.
__device__ __forceinline__ void find_top(float (&s)[32], uint2 valid, float (&top)[2]) {
  if ((valid.x & valid.y) != 0xffffffffu) {
    const int shift = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const std::uint32_t bits = (j < 4 ? valid.x : valid.y) >> (j % 4 * 8 + shift);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(bits >> e % 2 & 1)) s[4 * j + e] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    top[i] = s[2 * i];
#pragma unroll
    for (int j = 0; j < 8; ++j) top[i] = fmaxf(top[i], fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    top[i] = fmaxf(top[i], __shfl_xor_sync(kAllLanes, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(kAllLanes, top[i], 2));
  }
}

/// Scores of keys 8 kBegin to 8 kEnd become weights, packed as A of the next product.
template <class T, int kBegin, int kEnd>
__device__ __forceinline__ void weigh_keys(const float (&s)[32], float scale, Rows& rows, std::uint32_t (&p)[4][4]) {
#pragma unroll
  for (int j = kBegin; j < kEnd; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = power_of_two(__fmaf_rn(s[4 * j + 2 * i], scale, -rows.reference[i]));
      const float high = power_of_two(__fmaf_rn(s[4 * j + 2 * i + 1], scale, -rows.reference[i]));
      rows.sum[i] += low + high;
      p[j / 2][i + j % 2 * 2] = rounded_pair<T>(low, high);
    }
}

/// This thread's rows of a tile: row_of() and 8 on.
__device__ __forceinline__ int row_of() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

/// Weights of steps of 16 keys, for the other warpgroup.
template <int kBegin, int kEnd>
__device__ __forceinline__ void store_weights(Tile& tile, const std::uint32_t (&p)[4][4]) {
#pragma unroll
  for (int step = kBegin; step < kEnd; ++step)
    store_fragment(shared_address(&tile) +
                       swizzled(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, 2 * step + threadIdx.x / 16 % 2),
                   p[step]);
}

/// Tells the other warpgroup about the rows.
__device__ __forceinline__ void tell_references(RowState* states, const Rows& rows) {
  if (threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) states[row_of() + 8 * i].reference = rows.reference[i];
}
/// At the end of an item; the sum over the four threads of a row.
__device__ __forceinline__ void tell_sums(RowState* states, Rows& rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    RowState& state = states[row_of() + 8 * i];
    rows.sum[i] += __shfl_xor_sync(kAllLanes, rows.sum[i], 1);
    rows.sum[i] += __shfl_xor_sync(kAllLanes, rows.sum[i], 2);
    if (threadIdx.x % 4 != 0) continue;
    state.sum = rows.sum[i];
    state.top = rows.top[i];
  }
}

/// The sinks of this thread's rows, in units of log 2; asked for before they are needed.
__device__ __forceinline__ void load_sinks(const Problem& problem, const Item& item, float (&sink)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = item.head_tile * kHeads + row_of() + 8 * i;
    sink[i] = head < problem.h_q && problem.attn_sink ? problem.attn_sink[head] : -INFINITY;
  }
}

/// Rounds a warpgroup's columns of the output into the tiles: of each a warp's 16 rows, tile after tile.
template <class T>
__device__ __forceinline__ void stage_output(Tile* tiles, const float (&o)[128], const Rows& rows,
                                             const float (&sum)[2], const float (&sink)[2]) {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));  // threadIdx.x, or all addresses would be kept across the loop
  const std::uint32_t warp = thread % 128 / kWarpSize, to = shared_address(tiles + warp);
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float all = sum[i] + power_of_two(sink[i] * kLog2e - rows.reference[i]);
    factor[i] = sum[i] == 0 ? 0.f : 1 / all;
  }
#pragma unroll
  for (int j = 0; j < 32; j += 2) {
    std::uint32_t words[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = 4 * (j + e / 2) + 2 * (e % 2);
      words[e] = rounded_pair<T>(o[at] * factor[e % 2], o[at + 1] * factor[e % 2]);
    }
    store_fragment(to + j / 8 * (sizeof(Tile) / 4) + swizzled(thread % 16, j % 8 + thread / 16 % 2), words);
  }
}

/// Stores what the warp has staged; heads beyond the last one are not stored.
__device__ __forceinline__ void store_staged(const CUtensorMap& out, const Tile* tiles, const Item& item,
                                             int column_tile) {
  const int warp = threadIdx.x % 128 / kWarpSize;
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x % kWarpSize != 0) return;
  tensor_store(out, tiles + warp, 0, item.head_tile * kHeads + 16 * warp, column_tile, item.query, L2Hint::kEvictFirst);
  bulk_commit();
}

__device__ __forceinline__ void arrive_once_a_warp(MBarrier& barrier) {
  if (threadIdx.x % kWarpSize == 0) barrier.arrive();
}

/// Lets the tiles go once what is staged there has been read.
__device__ __forceinline__ void release_staged(MBarrier& barrier) {
  if (threadIdx.x % kWarpSize != 0) return;
  bulk_wait_read();
  barrier.arrive();
}

}  // namespace dsm::sparse_prefill_sm90
