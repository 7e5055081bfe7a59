// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/barrier.cuh"
#include "src/cuda/ptx/wgmma.cuh"
#include "src/cuda/reduce/warp.cuh"

// Scores of up to 16 heads become weights, where keys are the rows of a product and heads its columns.

namespace dsm::attention {

/// For one warpgroup, or so many of a block, the first ones, each by itself.
template <int kWarpgroups>
struct FewHeadsSoftmax {
  static constexpr int kTileHeads = 16;  // of a thread block
  static constexpr int kWarpgroup = 128, kWarps = kWarpgroup / 32;
  static constexpr int kOwnHeads = kTileHeads / 4;  // of a thread: number 2 j + k is head 8 j + 2 (lane % 4) + k
  static constexpr int kWeighing = 1;               // named barrier of the first warpgroup, those of others follow

  /// Of each head, what a warp's keys come to.
  using OfWarps = float[kTileHeads][kWarps];

  /// As wgmma has them: of the thread's keys (or columns) 16 warp + lane / 4 + 8 i, number 4 j + 2 i + k is of its head
  /// 2 j + k.
  using Product = float[kTileHeads / 2];

  __device__ __forceinline__ static int warp() { return threadIdx.x % kWarpgroup / 32; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int head(int own) { return own / 2 * 8 + lane() % 4 * 2 + own % 2; }

  /// Warps of the thread's warpgroup wait for each other.
  __device__ __forceinline__ static void await_warpgroup() {
    cuda::named_sync(kWarpgroups == 1 ? kWeighing : kWeighing + threadIdx.x / kWarpgroup, kWarpgroup);
  }

  /// Weights to a swizzled tile in shared memory, heads by keys, where products of all warps take them.
  template <class T>
  __device__ __forceinline__ static void store_weights(const Product& weights, std::uint8_t* tile) {
    static_assert(kTileHeads == 16);
    std::uint32_t words[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) words[m] = cuda::rounded_pair<T>(weights[2 * m], weights[2 * m + 1]);
    const int matrix = lane() / 8;
    cuda::store_transposed(
        cuda::shared_address(tile) + cuda::swizzled(8 * (matrix / 2) + lane() % 8, 2 * warp() + matrix % 2), words);
    cuda::fence_async_shared();
  }

  /// Multiplies products by the factors of their heads, if any is not 1.
  template <int kProducts>
  __device__ __forceinline__ static void multiply_heads(Product (&products)[kProducts],
                                                        const float (&factors)[kOwnHeads]) {
    bool one = true;
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) one &= factors[i] == 1;
    if (__all_sync(cuda::kAllLanes, one)) return;
#pragma unroll
    for (int t = 0; t < kProducts; ++t)
#pragma unroll
      for (int i = 0; i < kTileHeads / 2; ++i) products[t][i] *= factors[i / 4 * 2 + i % 2];
  }

  /// Combines numbers of a thread's own heads over all keys of the warpgroup; all of its threads wait for each other.
  template <class Op>
  __device__ __forceinline__ static void combine_keys(float (&x)[kOwnHeads], OfWarps& of_warps, Op op) {
    float mine[kOwnHeads];
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) mine[i] = x[i];
    // Of two lanes one takes over half of the heads, the other one the other half.
#pragma unroll
    for (int step = 0; step < 3; ++step) {
      const int apart = 16 >> step, left = kOwnHeads >> (step + 1);
      const bool upper = threadIdx.x & apart;
      if (left == 0) mine[0] = op(mine[0], __shfl_xor_sync(cuda::kAllLanes, mine[0], apart));  // one is left
#pragma unroll
      for (int i = 0; i < left; ++i) {
        const float got = __shfl_xor_sync(cuda::kAllLanes, upper ? mine[i] : mine[i + left], apart);
        mine[i] = op(upper ? mine[i + left] : mine[i], got);
      }
    }
    of_warps[head(lane() * kOwnHeads / 32)][warp()] = mine[0];
    await_warpgroup();
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      const float4 all = *reinterpret_cast<const float4*>(of_warps[head(i)]);
      x[i] = op(op(all.x, all.y), op(all.z, all.w));
    }
  }

  /// The running softmax of a thread's own heads. Sums are over the thread's own keys.
  struct Softmax {
    float most[kOwnHeads], sum[kOwnHeads];

    __device__ Softmax() {
#pragma unroll
      for (int i = 0; i < kOwnHeads; ++i) most[i] = -INFINITY, sum[i] = 0;
    }

    /// Scores become weights (scale > 0); returns in `factors` what earlier ones are to be multiplied by.
    __device__ __forceinline__ void weigh(Product& s, const std::uint8_t* valid, float scale, OfWarps& of_warps,
                                          float (&factors)[kOwnHeads]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool is_key = valid[2 * warp() + i] >> lane() / 4 & 1;
#pragma unroll
        for (int own = 0; own < kOwnHeads; ++own) {
          float& score = s[own / 2 * 4 + 2 * i + own % 2];
          if (!is_key) score = -INFINITY;
        }
      }
      float block_most[kOwnHeads];
#pragma unroll
      for (int own = 0; own < kOwnHeads; ++own)
        block_most[own] = fmaxf(s[own / 2 * 4 + own % 2], s[own / 2 * 4 + 2 + own % 2]);
      combine_keys(block_most, of_warps, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
      for (int own = 0; own < kOwnHeads; ++own) {
        const float now = fmaxf(most[own], block_most[own] * scale), base = now == -INFINITY ? 0 : now;
        factors[own] = cuda::power_of_two(most[own] - base);
        most[own] = now;
        float added = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[own / 2 * 4 + 2 * i + own % 2];
          x = cuda::power_of_two(fmaf(x, scale, -base));
          added += x;
        }
        sum[own] = sum[own] * factors[own] + added;
      }
    }
  };
};

}  // namespace dsm::attention
