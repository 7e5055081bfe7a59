// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/attention/few_heads_softmax_sm90.cuh"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_gather.cuh"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/wgmma.cuh"

// Sparse prefill of up to 16 heads. Tensor cores take 64 rows at a time, so that keys and columns of the values are the
// rows, and heads the columns, of transposed products: scores Sᵀ = K Qᵀ, output Oᵀ = Vᵀ Pᵀ. A thread block works
// through queries. Of the blocks of 64 keys that its gatherer brings, two warpgroups have every other one each, with a
// softmax and an output of their own, and add up at the end of a query: neither waits for the other before.
//
// Bound by the rate of rows: 64 keys of d_qk 576 take 2380 cycles, of which the L2 needs 2300, as it brings 32 bytes a
// cycle to every multiprocessor at once, shared memory's port 1940, and the tensor cores 1360. H200, s_q 4096,
// bfloat16, 16 heads, random rows, us | part of the limit (8.2 TB/s of rows from the L2, or 4.3 from the device's
// memory) | the kernel for 64 heads | FlashMLA of vLLM's wheel, padded to 64 heads, in turns with it:
//
//   d_qk 576, topk 2048, s_kv   8192: 1347 | 87 % | 1564 | 1871
//                        s_kv 131072: 1838 | 95 % | 2005 | 2317
//   d_qk 512, topk  512, s_kv   8192:  391 | 67 % |  436 |  549

namespace dsm::sparse_prefill_sm90 {

using namespace cuda;

template <class T, int kTiles>
struct FewHeads : attention::FewHeadsSoftmax<2> {
  static constexpr int kValueTiles = 8, kOwnTiles = kValueTiles / 2;  // of the output, and of what a warpgroup stores
  static constexpr std::uint32_t kQueryTileBytes = sizeof(TileOf<kTileHeads>);

  /// Named barriers of both warpgroups, beside kWeighing and the next.
  enum : int { kPublished = 3, kMerged };

  struct Shared : Gathered<kTiles, kTileHeads> {
    struct Statistics {
      float most[kTileHeads], sum[kTileHeads];
    };

    alignas(1024) std::uint8_t weights[2][kQueryTileBytes];         // of either warpgroup, heads by keys
    alignas(1024) std::uint8_t out[2][kOwnTiles][kQueryTileBytes];  // heads by columns
    float4 published[2][kOwnTiles][2][kWarpgroup];  // what the other warpgroup stores of a warpgroup's output
    Statistics statistics[2];
    alignas(16) OfWarps of_warps[2];
  };

  /// Scores of a block as its columns arrive.
  __device__ __forceinline__ static void multiply_queries(Product& s, Shared& shared, int which, std::uint32_t parity,
                                                          std::uint32_t q_parity) {
    const std::uint64_t keys = k_major(shared.k[which]), q = k_major(shared.q);
    const auto multiply = [&](int tile) {
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma_m64n16<T, Major::k>(s, advanced(keys, tile * sizeof(Tile) + step * 32),
                                  advanced(q, tile * kQueryTileBytes + step * 32), tile > 0 || step > 0);
    };
    shared.q_ready.wait(q_parity);
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      shared.k_ready[which][group].wait(parity);
      fence_async_shared();
      wgmma_fence();
      multiply(2 * group);
      multiply(2 * group + 1);
      if (group == 3 && kTiles > kValueTiles) multiply(kValueTiles);
      wgmma_commit();
    }
  }

  /// Number t is the column tile t ^ which: a warpgroup stores the even numbers, and the other one its odd ones.
  struct Output {
    Product values[kValueTiles] = {};

    __device__ __forceinline__ void registers() {
#pragma unroll
      for (Product& tile : values) wgmma_registers(tile);
    }
    /// Adds a block's products, and lets its columns go as they are done with.
    __device__ __forceinline__ void add_products(Shared& shared, int which) {
      const std::uint64_t even = m_major(shared.k[which] + which), odd = m_major(shared.k[which] + (which ^ 1)),
                          weights = k_major(shared.weights[which]);
      registers();
      wgmma_fence();
#pragma unroll
      for (int half : {kLeft, kRight}) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
          for (int t = half * kOwnTiles; t < (half + 1) * kOwnTiles; ++t)
            wgmma_m64n16<T, Major::m>(values[t], advanced(t % 2 ? odd : even, t / 2 * 2 * sizeof(Tile) + step * 2048),
                                      advanced(weights, step * 32), true);
        wgmma_commit();
      }
      wgmma_wait<1>();
      release(shared.k_free[which][kLeft]);
      wgmma_wait<0>();
      release(shared.k_free[which][kRight]);
      registers();
    }
  };

  /// By every warp.
  __device__ __forceinline__ static void release(MBarrier& barrier) {
    if (lane() == 0) barrier.arrive();
  }

  /// Output and statistics of an item, to which the two warpgroups add up.
  __device__ __forceinline__ static void finish(const Problem& problem, const CUtensorMap& out, Shared& shared,
                                                int which, int query, Output& o, Softmax& softmax,
                                                const float (&sink)[kOwnHeads]) {
    const int thread = threadIdx.x % kWarpgroup, other = which ^ 1;
    if (thread == 0) bulk_wait_read();  // the item before has left
    combine_keys(softmax.sum, shared.of_warps[which], [](float x, float y) { return x + y; });
    typename Shared::Statistics& own = shared.statistics[which];
    if (thread < 4)
#pragma unroll
      for (int i = 0; i < kOwnHeads; ++i) own.most[head(i)] = softmax.most[i], own.sum[head(i)] = softmax.sum[i];
#pragma unroll
    for (int t = 0; t < kOwnTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* const of = &o.values[2 * t + 1][4 * j];
        shared.published[which][t][j][thread] = make_float4(of[0], of[1], of[2], of[3]);
      }
    named_sync(kPublished, kConsumers);
    float of_own[kOwnHeads], of_other[kOwnHeads];
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      const float its_most = shared.statistics[other].most[head(i)], its_sum = shared.statistics[other].sum[head(i)];
      const float most = fmaxf(softmax.most[i], its_most), base = most == -INFINITY ? 0 : most;
      of_own[i] = power_of_two(softmax.most[i] - base), of_other[i] = power_of_two(its_most - base);
      const float sum = __fadd_rn(__fmul_rn(softmax.sum[i], of_own[i]), __fmul_rn(its_sum, of_other[i]));
      const bool none = sum == 0;
      const float factor = none ? 0 : 1 / (sum + power_of_two(sink[i] - base));
      of_own[i] *= factor, of_other[i] *= factor;
      if (threadIdx.x >= 4 || head(i) >= problem.h_q) continue;
      store_statistics(problem, query, head(i), none ? -INFINITY : most * kLn2,
                       none ? INFINITY : (base + log2f(sum)) * kLn2);
    }
#pragma unroll
    for (int t = 0; t < kOwnTiles; ++t) {
      Product& values = o.values[2 * t];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 its = shared.published[other][t][j][thread];
        const float adds[4] = {its.x, its.y, its.z, its.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          values[4 * j + i] = fmaf(adds[i], of_other[2 * j + i % 2], values[4 * j + i] * of_own[2 * j + i % 2]);
      }
      store_weights<T>(values, shared.out[which][t]);
    }
    named_sync(kMerged, kConsumers);
    if (thread == 0) {
#pragma unroll
      for (int t = 0; t < kOwnTiles; ++t)
        tensor_store(out, shared.out[which][t], 0, 0, 2 * t + which, query, L2Hint::kEvictFirst);
      bulk_commit();
    }
  }

  /// Makes the results, with every other block of keys.
  __device__ static void attend(const Problem& problem, const CUtensorMap& out, Shared& shared) {
    const int which = threadIdx.x / kWarpgroup;
    const float scale = problem.softmax_scale * kLog2e;
    float sink[kOwnHeads];
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i)
      sink[i] = problem.attn_sink && head(i) < problem.h_q ? problem.attn_sink[head(i)] * kLog2e : -INFINITY;
    std::uint32_t parity = 0, q_parity = 0;
    while (true) {
      shared.valid_ready[which].wait(parity);
      const Item item = shared.item[which];
      if (item.query < 0) break;
      Softmax softmax;
      Output o;
      for (int pair = 0; pair < item.pairs; ++pair, parity ^= 1) {
        shared.valid_ready[which].wait(parity);
        Product s;
        wgmma_registers(s);
        multiply_queries(s, shared, which, parity, q_parity);
        wgmma_wait<0>();
        wgmma_registers(s);
        if (pair + 1 == item.pairs) release(shared.q_free);
        float factors[kOwnHeads];
        softmax.weigh(s, reinterpret_cast<const std::uint8_t*>(shared.valid[which]), scale, shared.of_warps[which],
                      factors);
        store_weights<T>(s, shared.weights[which]);
        await_warpgroup();
        multiply_heads(o.values, factors);
        o.add_products(shared, which);
      }
      finish(problem, out, shared, which, item.query, o, softmax, sink);
      q_parity ^= 1;
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait_read();
  }
};

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_mla_prefill_few_heads_sm90_kernel(const __grid_constant__ Problem problem,
                                             const __grid_constant__ CUtensorMap q,
                                             const __grid_constant__ CUtensorMap out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Kernel = FewHeads<T, kTiles>;
  extern __shared__ __align__(1024) std::byte bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(bytes);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (threadIdx.x < kConsumers)
    Kernel::attend(problem, out, shared);
  else
    gather<T>(problem, q, shared);
#endif
}

}  // namespace dsm::sparse_prefill_sm90
