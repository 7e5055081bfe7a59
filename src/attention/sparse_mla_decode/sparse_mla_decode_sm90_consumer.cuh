// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/wgmma.cuh"

// Scores, weights and results. Both warpgroups have half the columns of the output.

namespace dsm::sparse_mla_sm90 {

/// Half of the output rows: of each of a thread's two rows (8 apart), pairs of columns 8 apart. In two halves: 512
/// threads leave too few registers for an instruction with more.
struct Output {
  static constexpr int kHalf = kColumns / 4;
  float values[2][kHalf] = {};

  __device__ float value(int i) const { return values[i / kHalf][i % kHalf]; }

  __device__ void multiply(const float (&factors)[2]) {
    if (__all_sync(cuda::kAllLanes, factors[0] == 1 && factors[1] == 1)) return;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) values[i / kHalf][i % kHalf] *= factors[i / 2 % 2];
  }
  /// Adds weights times values, of which `values` is the first column tile; not waited for. A: 16 keys' weights.
  template <class A>
  __device__ void add_products(const A (&weights)[kKeys / 16], const std::uint8_t* first_tile) {
    cuda::wgmma_registers(values[0]);
    cuda::wgmma_registers(values[1]);
    cuda::wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint64_t tiles = cuda::n_major(first_tile + half * (kHalf / 32) * kTileBytes, kTileBytes);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        cuda::wgmma_m64n128<__nv_bfloat16, cuda::Major::n>(values[half], weights[k], cuda::advanced(tiles, k * 2048),
                                                           true);
    }
    cuda::wgmma_commit();
  }
  template <int kLater>
  __device__ void await_products() {
    cuda::wgmma_wait<kLater>();
    cuda::wgmma_registers(values[0]);
    cuda::wgmma_registers(values[1]);
  }
};

/// First of the two rows of a tile that a thread of a warpgroup has.
__device__ __forceinline__ int row_of_thread() { return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4; }

/// Rows of finished requests to the result, of others to the workspace.
__device__ __forceinline__ void store_output(const Problem& p, const Output& o, int request, int slot,
                                             int first_column) {
  const RowTile tile(p);
  if (slot >= 0) {
    if (tile.has_strip(p)) split_kv::store_values(p.pieces, slot, tile.strip(p), first_column / kColumns, o.values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = tile.first_head + row_of_thread() + 8 * i;
    __nv_bfloat16* to = p.out + request * p.out_request + tile.position * p.out_position + head * p.out_head +
                        first_column + threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 4) {
      std::uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = 4 * (j + k) + 2 * i;
        words[k] = cuda::rounded_pair<__nv_bfloat16>(o.value(at), o.value(at + 1));
      }
      cuda::transpose_quad(words);
      if (head < p.h_q) *reinterpret_cast<uint4*>(to + j * 8) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

/// Asks for the queries of a request, zeros for heads that are none.
template <int kWidth>
__device__ __forceinline__ void ask_queries(const Problem& p, int request, Shared<kWidth>& shared) {
  const RowTile tile(p);
  const __nv_bfloat16* q = p.q + request * p.q_request + tile.position * p.q_position;
  const int chunk = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kHeads / 16; ++i) {
    const int row = threadIdx.x % kWarpgroup / 8 + 16 * i, head = tile.first_head + row;
    const __nv_bfloat16* from = q + (head < p.h_q ? head : 0) * p.q_head + chunk * 8;
    const std::uint32_t to = cuda::shared_address(shared.q) + cuda::swizzled(row, chunk);
#pragma unroll
    for (int t = 0; t < Shared<kWidth>::kTiles; ++t)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + t * kTileBytes), "l"(from + 64 * t),
                   "r"(head < p.h_q ? 16 : 0)
                   : "memory");
  }
}
__device__ __forceinline__ void await_queries() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  cuda::fence_async_shared();
  cuda::named_sync(kScores, kWarpgroup);
}

/// Scores of a block of keys when it is there, not waited for: d[4 j + 2 i + k] is that of the thread's row i and key 8
/// j + 2 quad + k.
using Scores = float[kKeys / 2];

template <int kWidth>
__device__ __forceinline__ void multiply_queries(Scores& s, Shared<kWidth>& shared, Use use) {
  shared.full[use.buffer()].wait(use.parity());
  const std::uint64_t q = cuda::k_major(shared.q), keys = cuda::k_major(shared.keys[use.buffer()]);
  cuda::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    const std::uint32_t at = k / 4 * kTileBytes + k % 4 * 32;
    cuda::wgmma_m64n64<__nv_bfloat16, cuda::Major::k>(s, cuda::advanced(q, at), cuda::advanced(keys, at), k != 0);
  }
  cuda::wgmma_commit();
}

/// The running softmax of a thread's two rows. Sums are over the thread's own keys.
struct Softmax {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  /// Scores become weights (scale > 0); returns in `factors` what earlier ones are to be multiplied by.
  __device__ void weigh(Scores& s, const std::uint8_t* valid, float scale, float (&factors)[2]) {
    const int quad = threadIdx.x % 4;
    const uint2 mask = *reinterpret_cast<const uint2*>(valid);
    if ((mask.x & mask.y) != 0xffffffff) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = i / 4 * 8 + i % 2;  // and 2 quad
        if (((key < 32 ? mask.x : mask.y) >> 2 * quad >> key % 32 & 1) == 0) s[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float block_most = s[2 * row];
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 2 % 2 == row) block_most = fmaxf(block_most, s[i]);
      block_most = fmaxf(block_most, __shfl_xor_sync(cuda::kAllLanes, block_most, 1));
      block_most = fmaxf(block_most, __shfl_xor_sync(cuda::kAllLanes, block_most, 2));
      const float now = fmaxf(most[row], block_most * scale), base = now == -INFINITY ? 0 : now;
      factors[row] = cuda::power_of_two(most[row] - base);
      most[row] = now;
      float added = 0;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (i / 2 % 2 != row) continue;
        s[i] = cuda::power_of_two(fmaf(s[i], scale, -base));
        added += s[i];
      }
      sum[row] = sum[row] * factors[row] + added;
    }
  }

  __device__ void add_lanes() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += __shfl_xor_sync(cuda::kAllLanes, sum[row], 1);
      sum[row] += __shfl_xor_sync(cuda::kAllLanes, sum[row], 2);
    }
  }
};

/// Writes one number of each row, which a row's four lanes have in common.
__device__ __forceinline__ void share_factors(float* to, const float (&factors)[2]) {
  if (threadIdx.x % 4 != 0) return;
  to[row_of_thread()] = factors[0];
  to[row_of_thread() + 8] = factors[1];
}

template <class S>
__device__ __forceinline__ void release_keys(S& shared, int buffer) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) shared.empty[buffer].arrive();
}

/// Factors of finished rows, whose statistics go to the result or the workspace.
__device__ __forceinline__ void finish(const Problem& p, Softmax& softmax, int request, int slot, float (&factors)[2]) {
  const RowTile tile(p);
  softmax.add_lanes();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = tile.first_head + row_of_thread() + 8 * i;
    const float sum = softmax.sum[i], most = softmax.most[i];
    const bool keys = sum != 0, there = head < p.h_q;
    const bool sink = slot < 0 && p.attn_sink && there;
    factors[i] = keys ? 1 / (sum + (sink ? cuda::power_of_two(p.attn_sink[head] * kLog2e - most) : 0)) : 0;
    if (slot >= 0) factors[i] = 1;
    if (!there || threadIdx.x % 4 != 0) continue;
    if (slot < 0)
      p.lse[(std::int64_t{request} * p.h_q + head) * p.s_q + tile.position] =
          keys ? (most + log2f(sum)) * kLn2 : INFINITY;
    else
      split_kv::store_state(p.pieces, slot, tile.strip(p), row_of_thread() % split_kv::kStripRows + 8 * i, most, sum);
  }
}

/// Makes the scores and the weights, and the first half of the output's columns. A request's last message has the
/// factors of its finished rows.
template <int kWidth>
__device__ __forceinline__ void weigh_keys(const Problem& p, const split_kv::Part& part, Shared<kWidth>& shared) {
  Use use;
  ask_queries(p, part.first_request, shared);
  for (int request = part.first_request; request <= part.last_request; ++request) {
    const Run run(p, part, request);
    const int slot = slot_of(part, run, request);
    Softmax softmax;
    Output o;
    await_queries();
    for (int block = run.begin;; ++block, ++use.n) {
      const bool finished = block >= run.end;
      float factors[2];
      std::uint32_t weights[kKeys / 16][4];  // as wgmma takes them: of keys 16 k + 8 h, row i in word i + 2 h
      if (!finished) {
        Scores s;
        multiply_queries(s, shared, use);
        cuda::wgmma_wait<0>();
        cuda::wgmma_registers(s);
        softmax.weigh(s, shared.valid[use.buffer()], p.scale, factors);
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            weights[j / 2][i + j % 2 * 2] = cuda::rounded_pair<__nv_bfloat16>(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]);
      } else {
        finish(p, softmax, request, slot, factors);
      }
      if (request < part.last_request && block == max(run.end - 1, run.begin)) {  // the queries' last use is over
        cuda::named_sync(kScores, kWarpgroup);
        ask_queries(p, request + 1, shared);
      }
      cuda::named_sync(kReceived, 2 * kWarpgroup);
      share_factors(shared.factors, factors);
      if (!finished) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            *reinterpret_cast<std::uint32_t*>(shared.weights + cuda::swizzled(row_of_thread() + 8 * i, j) +
                                              threadIdx.x % 4 * 4) = weights[j / 2][i + j % 2 * 2];
        cuda::fence_async_shared();
      }
      cuda::named_arrive(kMessage, 2 * kWarpgroup);
      o.multiply(factors);
      if (finished) break;
      o.add_products(weights, shared.keys[use.buffer()]);
      o.await_products<0>();
      release_keys(shared, use.buffer());
    }
    store_output(p, o, request, slot, 0);
  }
  cuda::named_sync(kReceived, 2 * kWarpgroup);
}

/// Makes the second half of the output's columns.
template <int kWidth>
__device__ __forceinline__ void weigh_other_half(const Problem& p, const split_kv::Part& part, Shared<kWidth>& shared) {
  Use use;
  cuda::named_arrive(kReceived, 2 * kWarpgroup);
  for (int request = part.first_request; request <= part.last_request; ++request) {
    const Run run(p, part, request);
    Output o;
    for (int block = run.begin;; ++block, ++use.n) {
      const bool finished = block >= run.end;
      cuda::named_sync(kMessage, 2 * kWarpgroup);
      const float factors[2] = {shared.factors[row_of_thread()], shared.factors[row_of_thread() + 8]};
      o.multiply(factors);
      if (finished) break;
      shared.full[use.buffer()].wait(use.parity());
      const std::uint64_t tile = cuda::k_major(shared.weights);
      const std::uint64_t weights[kKeys / 16] = {tile, cuda::advanced(tile, 32), cuda::advanced(tile, 64),
                                                 cuda::advanced(tile, 96)};
      o.add_products(weights, shared.keys[use.buffer()] + kColumns / 64 * kTileBytes);
      o.await_products<0>();
      cuda::named_arrive(kReceived, 2 * kWarpgroup);
      release_keys(shared, use.buffer());
    }
    cuda::named_arrive(kReceived, 2 * kWarpgroup);
    store_output(p, o, request, slot_of(part, run, request), kColumns);
  }
}

}  // namespace dsm::sparse_mla_sm90
