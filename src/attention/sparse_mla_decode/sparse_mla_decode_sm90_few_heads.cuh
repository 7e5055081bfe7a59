// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/attention/few_heads_softmax_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_row_copies.cuh"
#include "src/cuda/copy/async.cuh"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/wgmma.cuh"

// Sparse decode by tiles of up to 16 heads. Tensor cores take 64 rows at a time, so that keys and columns of the values
// are the rows, and heads the columns, of transposed products: scores Sᵀ = K Qᵀ, output Oᵀ = Vᵀ Pᵀ. One warpgroup makes
// all of it, 80 numbers of a thread; two convert rows, which two warps more have copied.
//
// Bound by the warpgroup that makes it. 64 keys take it 3500 cycles (scores 1000 to 1250, weights 900 to 1150, values
// 1200 to 1300), or 2700 with the port of shared memory to itself, of which all together need 2600. Of V3.2 there is
// room for one block of rows to be copied, which takes nearly as long: 1400 to 2500 to ask for them, then the memory's
// latency. Rows are marked to give way first in the L2, where one position reads them: what they would drive out has
// often to be written first (5 % of the time; the benchmark's L2 is full of such lines). What did not help: values in a
// warpgroup of their own (the two products wait for each other at the port, and the weights for both: as fast with V4,
// 8 % slower with V3.2); scores of the next keys beside the weights of these (10 to 20 % slower); copies by the lanes
// that convert (1 to 5 % slower: memory that is busy stops them); what ends a request gone through once beforehand; all
// of a block gone through once before there are keys, by who converts and who multiplies (8 % slower with batch 2).
//
// H200, 16 heads, us end to end, beside the limit max(bytes / 4.3 TB/s, FLOP / 740 TFLOPS) and the same with the kernel
// for 64 heads: V4, 128 + 512: batch 2 11.0 (0.2; 17.0), 16 15.4 (1.8; 21.8), 64 22.9 (6; 33.2), 128 29.4 (12; 47.6).
// V3.2, 2048: batch 2 12.8; with long lists it has another kernel (sparse_mla_decode_sm90_few_heads_v32.cuh).

namespace dsm::sparse_mla_sm90 {

template <class Record, class Extra>
struct FewHeads : attention::FewHeadsSoftmax<1> {
  static constexpr int kThreads = kWarpgroup + (kConverters + kCopiers) * 32;
  static constexpr int kTiles = Record::kWidth / 64;
  static constexpr std::uint32_t kQueryTileBytes = kTileHeads * 128;
  static constexpr int kFirstTiles = Pieces<Record>::kFirstTiles;
  static_assert(kFirstTiles == Pieces<Extra>::kFirstTiles);
  using Tile = RowTile<kTileHeads>;

  struct Shared {
    static constexpr std::size_t kKeyBytes = kTiles * kTileBytes, kQueryBytes = kTiles * kQueryTileBytes;
    using Rows = CopiedRows<Record, Extra>;
    /// Halves of blocks that are copied before they are converted: as many as there is room for.
    static constexpr int kRows =
        kKeyBuffers * kKeyBytes + kQueryBytes + kQueryTileBytes + 4 * sizeof(Rows) <= 225 * 1024 ? 4 : 2;

    alignas(1024) std::uint8_t keys[kKeyBuffers][kKeyBytes];  // swizzled tiles of 64 columns, as q
    alignas(1024) std::uint8_t q[kQueryBytes];
    alignas(1024) std::uint8_t weights[kQueryTileBytes];  // a swizzled tile: heads by keys
    Rows rows[kRows];
    alignas(16) OfWarps of_warps;
    std::uint8_t valid[kKeyBuffers][kKeys / 8];                  // bit per key
    cuda::MBarrier full[kKeyBuffers][2], empty[kKeyBuffers][2];  // of the first and the last columns
  };

  /// Asks for the queries of a request, zeros for heads that are none.
  __device__ __forceinline__ static void ask_queries(const Problem& p, int request, Shared& shared) {
    const Tile tile(p);
    const __nv_bfloat16* q = p.q + request * p.q_request + tile.position * p.q_position + tile.first_head * p.q_head;
    const int chunk = threadIdx.x % 8, heads = p.h_q - tile.first_head;
#pragma unroll
    for (int row = threadIdx.x / 8; row < kTileHeads; row += kWarpgroup / 8) {
      const __nv_bfloat16* from = q + (row < heads ? row : 0) * p.q_head + chunk * 8;
      const std::uint32_t to = cuda::shared_address(shared.q) + cuda::swizzled(row, chunk);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        cuda::copy_async<16>(to + t * kQueryTileBytes, from + 64 * t, row < heads ? 16 : 0);
    }
    cuda::end_copy_group();
  }

  __device__ __forceinline__ static void await_queries() {
    cuda::await_copy_groups<0>();
    cuda::fence_async_shared();
    await_warpgroup();
  }

  /// Scores of a block of keys when it is there, not waited for.
  __device__ __forceinline__ static void multiply_queries(Product& s, Shared& shared, Use use) {
    const std::uint64_t keys = cuda::k_major(shared.keys[use.buffer()]), q = cuda::k_major(shared.q);
#pragma unroll
    for (int lot = 0; lot < 2; ++lot) {
      shared.full[use.buffer()][lot].wait(use.parity());
      cuda::wgmma_fence();
#pragma unroll
      for (int k = lot == 0 ? 0 : 4 * kFirstTiles; k < (lot == 0 ? 4 * kFirstTiles : 4 * kTiles); ++k)
        cuda::wgmma_m64n16<__nv_bfloat16, cuda::Major::k>(s, cuda::advanced(keys, k / 4 * kTileBytes + k % 4 * 32),
                                                          cuda::advanced(q, k / 4 * kQueryTileBytes + k % 4 * 32),
                                                          k != 0);
      cuda::wgmma_commit();
    }
  }

  /// The output: of each column tile.
  struct Output {
    Product values[kValues / 64] = {};

    /// Adds products of a block of keys, each half of whose columns is let go when it is done with.
    __device__ __forceinline__ void add_products(Shared& shared, Use use) {
      const std::uint64_t keys = cuda::m_major(shared.keys[use.buffer()]), weights = cuda::k_major(shared.weights);
#pragma unroll
      for (int t = 0; t < kValues / 64; ++t) cuda::wgmma_registers(values[t]);
      cuda::wgmma_fence();
#pragma unroll
      for (int lot = 0; lot < 2; ++lot) {
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
          for (int t = lot == 0 ? 0 : kFirstTiles; t < (lot == 0 ? kFirstTiles : kValues / 64); ++t)
            cuda::wgmma_m64n16<__nv_bfloat16, cuda::Major::m>(
                values[t], cuda::advanced(keys, t * kTileBytes + k * 2048), cuda::advanced(weights, k * 32), true);
        cuda::wgmma_commit();
      }
      cuda::wgmma_wait<1>();
      release(shared.empty[use.buffer()][0]);
      cuda::wgmma_wait<0>();
      release(shared.empty[use.buffer()][1]);
#pragma unroll
      for (int t = 0; t < kValues / 64; ++t) cuda::wgmma_registers(values[t]);
    }
    __device__ __forceinline__ static void release(cuda::MBarrier& empty) {
      __syncwarp();
      if (lane() == 0) empty.arrive();
    }

    /// Where rows are heads, this is lane() of the warp.
    __device__ __forceinline__ static int row_lane() { return lane() % 4 * 8 + lane() / 4 % 2 * 4 + lane() / 8; }
    /// What row_lane() has of 16 heads and 8 columns, those of the thread's `i` in a tile: columns 2 (row_lane() % 4)
    /// and the next of head row_lane() / 4, and of the head 8 on.
    __device__ __forceinline__ static float4 rows_of(const Product& tile, int i) {
      const float* of = &tile[2 * i];
      const bool odd = lane() / 4 % 2;
      const float low = __shfl_xor_sync(cuda::kAllLanes, odd ? of[0] : of[1], 4);
      const float high = __shfl_xor_sync(cuda::kAllLanes, odd ? of[4] : of[5], 4);
      return odd ? make_float4(low, of[1], high, of[5]) : make_float4(of[0], low, of[4], high);
    }

    /// Heads of finished requests to the result, of others to the workspace.
    __device__ __forceinline__ void store(const Problem& p, int request, int slot) const {
      const Tile tile(p);
      const int first_head = tile.first_head + row_lane() / 4, strip = tile.strip(p);
      __nv_bfloat16* out = p.out + request * p.out_request + tile.position * p.out_position + first_head * p.out_head;
#pragma unroll
      for (int t = 0; t < kValues / 64; t += 2) {
        std::uint32_t low[4], high[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float4 rows = rows_of(values[t + m / 2], m % 2);
          if (slot >= 0)
            split_kv::store_values(p.pieces, slot, strip, 8 * (t + m / 2) + 2 * warp() + m % 2, row_lane(), rows);
          low[m] = cuda::rounded_pair<__nv_bfloat16>(rows.x, rows.y);
          high[m] = cuda::rounded_pair<__nv_bfloat16>(rows.z, rows.w);
        }
        if (slot >= 0) continue;
        cuda::transpose_quad<8>(low);
        cuda::transpose_quad<8>(high);
        const int column = 64 * (t + lane() / 16) + 16 * warp() + lane() / 8 % 2 * 8;
        if (first_head < p.h_q) *reinterpret_cast<uint4*>(out + column) = make_uint4(low[0], low[1], low[2], low[3]);
        if (first_head + 8 < p.h_q)
          *reinterpret_cast<uint4*>(out + 8 * p.out_head + column) = make_uint4(high[0], high[1], high[2], high[3]);
      }
    }
  };

  /// Base 2 logarithms of what is added to the sums of a thread's own heads of finished requests.
  struct Sinks {
    float logarithm[kOwnHeads];

    __device__ explicit Sinks(const Problem& p) {
      const int first_head = Tile(p).first_head;
#pragma unroll
      for (int i = 0; i < kOwnHeads; ++i)
        logarithm[i] =
            p.attn_sink && first_head + head(i) < p.h_q ? p.attn_sink[first_head + head(i)] * kLog2e : -INFINITY;
    }
  };

  /// Factors of finished heads, whose statistics go to the result or the workspace.
  __device__ __forceinline__ static void finish(const Problem& p, const Sinks& sinks, Softmax& softmax, Shared& shared,
                                                int request, int slot, float (&factors)[kOwnHeads]) {
    static_assert(kTileHeads == split_kv::kStripRows);
    const Tile tile(p);
    combine_keys(softmax.sum, shared.of_warps, [](float x, float y) { return x + y; });
#pragma unroll
    for (int own = 0; own < kOwnHeads; ++own) {
      const float sum = softmax.sum[own], most = softmax.most[own];
      const bool keys = sum != 0;
      factors[own] = slot >= 0 ? 1 : keys ? 1 / (sum + cuda::power_of_two(sinks.logarithm[own] - most)) : 0;
      if (tile.first_head + head(own) >= p.h_q || threadIdx.x >= 4) continue;
      if (slot < 0)
        p.lse[(std::int64_t{request} * p.h_q + tile.first_head + head(own)) * p.s_q + tile.position] =
            keys ? (most + log2f(sum)) * kLn2 : INFINITY;
      else
        split_kv::store_state(p.pieces, slot, tile.strip(p), head(own), most, sum);
    }
  }

  /// Makes the results.
  __device__ __forceinline__ static void weigh_keys(const Problem& p, const split_kv::Part& part, Shared& shared) {
    Use use;
    ask_queries(p, part.first_request, shared);
    const Sinks sinks(p);
    for (int request = part.first_request; request <= part.last_request; ++request) {
      const Run run(p, part, request);
      const int slot = slot_of(part, run, request);
      Softmax softmax;
      Output o;
      float factors[kOwnHeads];
      await_queries();
      for (int block = run.begin; block < run.end; ++block, ++use.n) {
        Product s;
        multiply_queries(s, shared, use);
        cuda::wgmma_wait<0>();
        cuda::wgmma_registers(s);
        softmax.weigh(s, shared.valid[use.buffer()], p.scale, shared.of_warps, factors);
        store_weights<__nv_bfloat16>(s, shared.weights);
        if (request < part.last_request && block == run.end - 1)  // the queries' last use is over
          ask_queries(p, request + 1, shared);
        await_warpgroup();
        multiply_heads(o.values, factors);
        o.add_products(shared, use);
      }
      if (request < part.last_request && run.begin >= run.end) ask_queries(p, request + 1, shared);
      if (slot < 0) {
        finish(p, sinks, softmax, shared, request, slot, factors);
        multiply_heads(o.values, factors);
      }
      o.store(p, request, slot);
      if (slot >= 0) finish(p, sinks, softmax, shared, request, slot, factors);  // while its values are stored
    }
  }
};

}  // namespace dsm::sparse_mla_sm90
