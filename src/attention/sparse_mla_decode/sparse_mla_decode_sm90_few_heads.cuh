// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_consumer.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_row_copies.cuh"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/wgmma.cuh"

// Sparse decode of up to 16 heads. Tensor cores take 64 rows at a time, so that keys and columns of the values are the
// rows, and heads the columns, of transposed products: scores Sᵀ = K Qᵀ, output Oᵀ = Vᵀ Pᵀ. One warpgroup makes all of
// it, 80 numbers of a thread; two bring keys.
//
// Bound by those who bring keys. 64 keys take them 3900 cycles: 350 to 1200 to take the rows from shared memory, 1000
// to 1900 to have the next ones copied, as the copy engine takes some 20 cycles for a row, 900 to 1400 to convert them;
// that memory is hardly waited for. The other warpgroup needs 2700 of it (scores 860, weights 930, values 930). The
// port of shared memory alone would allow 2600.
//
// H200, 16 heads, us end to end, beside the limit max(bytes / 4.3 TB/s, FLOP / 740 TFLOPS) and the same with the kernel
// for 64 heads: V4, 128 + 512: batch 2 13.7 (0.2; 17.0), 16 17.9 (1.8; 21.8), 64 25.7 (6; 33.2), 128 36.6 (12; 47.6).
// V3.2, 2048: batch 2 14.9, 16 23.6, 64 50.6, 128 84.5 (41; 117).

namespace dsm::sparse_mla_sm90 {

template <class Record, class Extra>
struct FewHeads {
  static constexpr int kTileHeads = 16;  // of a thread block
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kWarps = kWarpgroup / 32;
  static constexpr int kTiles = Record::kWidth / 64;
  static constexpr std::uint32_t kQueryTileBytes = kTileHeads * 128;
  static constexpr int kOwnHeads = kTileHeads / 4;  // of a thread: number 2 j + k is head 8 j + 2 (lane % 4) + k

  struct Shared {
    alignas(1024) std::uint8_t keys[kKeyBuffers][kTiles * kTileBytes];  // swizzled tiles of 64 columns, as q
    alignas(1024) std::uint8_t q[kTiles * kQueryTileBytes];
    alignas(1024) std::uint8_t weights[kQueryTileBytes];  // a swizzled tile: heads by keys
    RawRows<Record, Extra> rows[kKeys / kRowsPerWarp];    // of each warp that brings keys
    alignas(16) float of_warps[kTileHeads][kWarps];       // of each head, what a warp's keys come to
    std::uint8_t valid[kKeyBuffers][kKeys / 8];           // bit per key
    cuda::MBarrier full[kKeyBuffers], empty[kKeyBuffers];
  };

  /// As wgmma has them: of the thread's keys (or columns) 16 warp + lane / 4 + 8 i, number 4 j + 2 i + k is of its head
  /// 2 j + k.
  using Product = float[kTileHeads / 2];

  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int head(int own) { return own / 2 * 8 + lane() % 4 * 2 + own % 2; }

  /// Asks for the queries of a request, zeros for heads that are none.
  __device__ __forceinline__ static void ask_queries(const Problem& p, int request, Shared& shared) {
    const __nv_bfloat16* q = p.q + request * p.q_request + RowTile(p).position * p.q_position;
    const int chunk = threadIdx.x % 8;
#pragma unroll
    for (int row = threadIdx.x / 8; row < kTileHeads; row += kWarpgroup / 8) {
      const __nv_bfloat16* from = q + (row < p.h_q ? row : 0) * p.q_head + chunk * 8;
      const std::uint32_t to = cuda::shared_address(shared.q) + cuda::swizzled(row, chunk);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + t * kQueryTileBytes),
                     "l"(from + 64 * t), "r"(row < p.h_q ? 16 : 0)
                     : "memory");
    }
  }

  /// Scores of a block of keys when it is there, not waited for.
  __device__ __forceinline__ static void multiply_queries(Product& s, Shared& shared, Use use) {
    shared.full[use.buffer()].wait(use.parity());
    const std::uint64_t keys = cuda::k_major(shared.keys[use.buffer()]), q = cuda::k_major(shared.q);
    cuda::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Record::kWidth / 16; ++k)
      cuda::wgmma_m64n16<__nv_bfloat16, cuda::Major::k>(s, cuda::advanced(keys, k / 4 * kTileBytes + k % 4 * 32),
                                                        cuda::advanced(q, k / 4 * kQueryTileBytes + k % 4 * 32),
                                                        k != 0);
    cuda::wgmma_commit();
  }

  /// Combines numbers of a thread's own heads over all keys of the warpgroup; all of its threads wait for each other.
  template <class Op>
  __device__ __forceinline__ static void combine_keys(float (&x)[kOwnHeads], Shared& shared, Op op) {
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
    shared.of_warps[head(lane() * kOwnHeads / 32)][warp()] = mine[0];
    cuda::named_sync(kScores, kWarpgroup);
#pragma unroll
    for (int i = 0; i < kOwnHeads; ++i) {
      const float4 all = *reinterpret_cast<const float4*>(shared.of_warps[head(i)]);
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
    __device__ __forceinline__ void weigh(Product& s, const std::uint8_t* valid, float scale, Shared& shared,
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
      combine_keys(block_most, shared, [](float x, float y) { return fmaxf(x, y); });
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

  /// Weights to shared memory, where products of all four warps take them.
  __device__ __forceinline__ static void store_weights(const Product& weights, Shared& shared) {
#pragma unroll
    for (int j = 0; j < kTileHeads / 8; j += 2) {
      std::uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* pair = &weights[4 * (j + m / 2) + 2 * (m % 2)];
        words[m] = cuda::rounded_pair<__nv_bfloat16>(pair[0], pair[1]);
      }
      const int matrix = lane() / 8;
      cuda::store_transposed(cuda::shared_address(shared.weights) +
                                 cuda::swizzled(8 * (j + matrix / 2) + lane() % 8, 2 * warp() + matrix % 2),
                             words);
    }
    cuda::fence_async_shared();
  }

  /// The output: of each column tile.
  struct Output {
    Product values[kValues / 64] = {};

    __device__ __forceinline__ void multiply(const float (&factors)[kOwnHeads]) {
      bool one = true;
#pragma unroll
      for (int i = 0; i < kOwnHeads; ++i) one &= factors[i] == 1;
      if (__all_sync(cuda::kAllLanes, one)) return;
#pragma unroll
      for (int t = 0; t < kValues / 64; ++t)
#pragma unroll
        for (int i = 0; i < kTileHeads / 2; ++i) values[t][i] *= factors[i / 4 * 2 + i % 2];
    }
    __device__ __forceinline__ void add_products(Shared& shared, Use use) {
      const std::uint64_t keys = cuda::m_major(shared.keys[use.buffer()]), weights = cuda::k_major(shared.weights);
#pragma unroll
      for (int t = 0; t < kValues / 64; ++t) cuda::wgmma_registers(values[t]);
      cuda::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
        for (int t = 0; t < kValues / 64; ++t)
          cuda::wgmma_m64n16<__nv_bfloat16, cuda::Major::m>(values[t], cuda::advanced(keys, t * kTileBytes + k * 2048),
                                                            cuda::advanced(weights, k * 32), true);
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
#pragma unroll
      for (int t = 0; t < kValues / 64; ++t) cuda::wgmma_registers(values[t]);
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
      const int position = RowTile(p).position, first_head = row_lane() / 4;
      __nv_bfloat16* out = p.out + request * p.out_request + position * p.out_position + first_head * p.out_head;
#pragma unroll
      for (int t = 0; t < kValues / 64; t += 2) {
        std::uint32_t low[4], high[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float4 rows = rows_of(values[t + m / 2], m % 2);
          if (slot >= 0)  // the position is one strip of rows
            split_kv::store_values(p.pieces, slot, position, 8 * (t + m / 2) + 2 * warp() + m % 2, row_lane(), rows);
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

  /// Factors of finished heads, whose statistics go to the result or the workspace.
  __device__ __forceinline__ static void finish(const Problem& p, Softmax& softmax, Shared& shared, int request,
                                                int slot, float (&factors)[kOwnHeads]) {
    static_assert(kTileHeads == split_kv::kStripRows);
    const int position = RowTile(p).position;
    combine_keys(softmax.sum, shared, [](float x, float y) { return x + y; });
#pragma unroll
    for (int own = 0; own < kOwnHeads; ++own) {
      const float sum = softmax.sum[own], most = softmax.most[own];
      const bool keys = sum != 0, there = head(own) < p.h_q;
      const bool sink = slot < 0 && p.attn_sink && there;
      factors[own] = keys ? 1 / (sum + (sink ? cuda::power_of_two(p.attn_sink[head(own)] * kLog2e - most) : 0)) : 0;
      if (slot >= 0) factors[own] = 1;
      if (!there || threadIdx.x >= 4) continue;
      if (slot < 0)
        p.lse[(std::int64_t{request} * p.h_q + head(own)) * p.s_q + position] =
            keys ? (most + log2f(sum)) * kLn2 : INFINITY;
      else
        split_kv::store_state(p.pieces, slot, position, head(own), most, sum);
    }
  }

  __device__ __forceinline__ static void weigh_keys(const Problem& p, const split_kv::Part& part, Shared& shared) {
    Use use;
    ask_queries(p, part.first_request, shared);
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
        softmax.weigh(s, shared.valid[use.buffer()], p.scale, shared, factors);
        store_weights(s, shared);
        if (request < part.last_request && block == run.end - 1)  // the queries' last use is over
          ask_queries(p, request + 1, shared);
        cuda::named_sync(kScores, kWarpgroup);
        o.multiply(factors);
        o.add_products(shared, use);
        release_keys(shared, use.buffer());
      }
      if (request < part.last_request && run.begin >= run.end) ask_queries(p, request + 1, shared);
      finish(p, softmax, shared, request, slot, factors);
      o.multiply(factors);
      o.store(p, request, slot);
    }
  }
};

}  // namespace dsm::sparse_mla_sm90
