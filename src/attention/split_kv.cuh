// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/split_kv.h"
#include "src/cuda/ptx/barrier.cuh"
#include "src/cuda/reduce/warp.cuh"

namespace dsm::split_kv {

__device__ __forceinline__ int key_count(std::int32_t most, const std::int32_t* length, int request) {
  return length ? min(max(length[request], 0), most) : most;
}
/// Blocks of the first cache (or of all keys), and of all lists of a request.
__device__ __forceinline__ int first_blocks(const Keys& keys, int request) {
  return blocks_of(key_count(keys.keys, keys.length, request));
}
__device__ __forceinline__ int block_count(const Keys& keys, int request) {
  return first_blocks(keys, request) + blocks_of(key_count(keys.extra_keys, keys.extra_length, request));
}

/// Shared memory that find_part needs while it runs.
inline constexpr std::size_t scratch_bytes(std::int64_t batch) { return static_cast<std::size_t>(batch) * sizeof(int); }

/// Stores columns 8 step to 8 step + 7 of a strip of a piece, of which a lane has two of rows lane / 4 and 8 on.
__device__ __forceinline__ void store_values(const Workspace& to, int slot, int strip, int step, int lane,
                                             const float4& values) {
  constexpr int kSteps = kStripValues / 4 / cuda::kWarpSize;
  reinterpret_cast<float4*>(to.values)[((to.first_strip(slot) + strip) * kSteps + step) * cuda::kWarpSize + lane] =
      values;
}
/// Stores one half of the columns of a strip of a piece, as a warp has them after products of 64 rows and 128 columns.
__device__ __forceinline__ void store_values(const Workspace& to, int slot, int strip, int half,
                                             const float (&columns)[2][64]) {
  constexpr int kHalf = 32;  // accesses of 16 bytes of a warp
  float4* at = reinterpret_cast<float4*>(to.values) +
               ((to.first_strip(slot) + strip) * 2 + half) * kHalf * cuda::kWarpSize + threadIdx.x % cuda::kWarpSize;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float* from = &columns[i / 16][i % 16 * 4];
    at[i * cuda::kWarpSize] = make_float4(from[0], from[1], from[2], from[3]);
  }
}
/// Stores the state of one row of a strip: the reference point of its exponentials, base 2, and their sum.
__device__ __forceinline__ void store_state(const Workspace& to, int slot, int strip, int row, float most, float sum) {
  reinterpret_cast<float2*>(to.states)[(to.first_strip(slot) + strip) * kStripRows + row] = make_float2(most, sum);
}

/// Sum of what the lanes before have, of which the first `lanes` have any.
__device__ __forceinline__ int sum_before(int own, int lanes = cuda::kWarpSize) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  int sum = own;
#pragma unroll 1
  for (int step = 1; step < lanes; step *= 2) {
    const int before = __shfl_up_sync(cuda::kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  return sum - own;
}

/// find_part where every part is a piece, of a length that follows from its request's own: every warp finds it.
__device__ inline Part find_invariant_part(const Keys& keys, int part, Pieces* pieces) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  Part found{keys.batch, -1, 0, 0, 0};
  int at = 0;  // parts of the requests before
#pragma unroll 1
  for (int first = 0; first < keys.batch && (pieces || at <= part); first += cuda::kWarpSize) {
    const bool there = first + lane < keys.batch;
    const int blocks = there ? block_count(keys, first + lane) : 0;
    const int length = max((blocks + keys.invariant_pieces - 1) / keys.invariant_pieces, kInvariantBlocks);
    const int own = there ? max((blocks + length - 1) / length, 1) : 0, before = at + sum_before(own);
    if (pieces && there && threadIdx.x < cuda::kWarpSize) pieces[first + lane] = {2 * before, own};
    const unsigned its = __ballot_sync(cuda::kAllLanes, before <= part && part < before + own);
    if (its) {
      const int begin = (part - before) * length, end = min(begin + length, blocks), owner = __ffs(its) - 1;
      found = {first + owner, first + owner, __shfl_sync(cuda::kAllLanes, begin, owner),
               __shfl_sync(cuda::kAllLanes, end, owner), __shfl_sync(cuda::kAllLanes, end - begin, owner)};
    }
    at = __shfl_sync(cuda::kAllLanes, before + own, cuda::kWarpSize - 1);
  }
  return found;
}

/// find_part for up to 32 requests: every warp finds it for itself.
__device__ inline Part find_part_of_few(const Keys& keys, int part, Pieces* pieces) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  const bool there = lane < keys.batch;
  const int blocks = there ? block_count(keys, lane) : 0;
  const int all_blocks = __reduce_add_sync(cuda::kAllLanes, blocks);
  const int in_turn = keys.parts.parts(all_blocks + keys.batch * keys.overhead_blocks),
            least = max(keys.parts.parts(all_blocks), 1);
  // Each lane divides by one of the lengths that are tried.
  const Reciprocal own(least + lane);
  const int tries = min(Line::longest_alone(in_turn) - least + 1, cuda::kWarpSize);
  Reciprocal length;
  bool enough, more;  // by votes, so that the compiler knows that all of a warp have the same
  int tried = 0;
#pragma unroll 1
  do {
    length.divisor = __shfl_sync(cuda::kAllLanes, own.divisor, tried);
    length.inverse = __shfl_sync(cuda::kAllLanes, own.inverse, tried);
    const int needed = __reduce_add_sync(cuda::kAllLanes, there ? max(length.parts(blocks), 1) : 0);
    enough = __all_sync(cuda::kAllLanes, needed <= static_cast<int>(keys.parts.divisor));
    more = __any_sync(cuda::kAllLanes, ++tried < tries);
  } while (!enough && more);
  const int most = __reduce_max_sync(cuda::kAllLanes, blocks);
  const Line line =
      enough ? Line(length) : Line(keys.overhead_blocks, in_turn, INT32_MAX, keys.parts.parts(keys.batch), most);
  const int at = sum_before(there ? line.stretch(blocks) : 0, keys.batch);
  const Line::Share share = line.share(part, at, blocks);
  if (pieces && there && threadIdx.x < cuda::kWarpSize) pieces[lane] = line.pieces(at, share);
  const unsigned any = __ballot_sync(cuda::kAllLanes, there && share.any);
  const int first = any ? __ffs(any) - 1 : keys.batch, last = any ? 31 - __clz(any) : -1;
  const int begin = __shfl_sync(cuda::kAllLanes, share.begin, first & 31),
            end = __shfl_sync(cuda::kAllLanes, share.end, last & 31);
  return {first, last, begin, end, __reduce_add_sync(cuda::kAllLanes, there ? share.blocks() : 0)};
}

/// The part with number `part`; all threads of the block call it, `scratch` is theirs until it returns, and all get the
/// same. With `pieces`, the pieces of all requests are written there.
__device__ inline Part find_part(const Keys& keys, int part, void* scratch, Pieces* pieces) {
  if (keys.invariant_pieces > 0) return find_invariant_part(keys, part, pieces);
  if (keys.batch <= cuda::kWarpSize) return find_part_of_few(keys, part, pieces);
  __shared__ Part found;
  __shared__ int all_blocks, most_blocks, own_parts[cuda::kWarpSize];
  auto* blocks = static_cast<int*>(scratch);
  const int lane = threadIdx.x % cuda::kWarpSize, warp = threadIdx.x / cuda::kWarpSize;
  if (warp == 0) own_parts[lane] = all_blocks = most_blocks = 0;
  __syncthreads();
  int sum = 0, most = 0;
#pragma unroll 1
  for (int b = threadIdx.x; b < keys.batch; b += blockDim.x) {
    blocks[b] = block_count(keys, b);
    sum += blocks[b], most = max(most, blocks[b]);
  }
  sum = __reduce_add_sync(cuda::kAllLanes, sum), most = __reduce_max_sync(cuda::kAllLanes, most);
  if (lane == 0) atomicAdd(&all_blocks, sum), atomicMax(&most_blocks, most);
  __syncthreads();

  // Parts that requests need for themselves if these have so many blocks; each lane tries a number.
  const int in_turn = keys.parts.parts(all_blocks + keys.batch * keys.overhead_blocks),
            least = max(keys.parts.parts(all_blocks), 1);
  const Reciprocal tried(least + lane);
  int needed = 0;
#pragma unroll 1
  for (int b = warp; b < keys.batch; b += blockDim.x / cuda::kWarpSize) needed += max(tried.parts(blocks[b]), 1);
  atomicAdd(&own_parts[lane], needed);
  __syncthreads();

  if (warp == 0) {
    const unsigned enough = __ballot_sync(cuda::kAllLanes, own_parts[lane] <= static_cast<int>(keys.parts.divisor));
    const Line line(keys.overhead_blocks, in_turn, enough ? least + __ffs(enough) - 1 : INT32_MAX,
                    keys.parts.parts(keys.batch), most_blocks);
    const int requests = (keys.batch + cuda::kWarpSize - 1) / cuda::kWarpSize;
    const int begin = min(lane * requests, keys.batch), end = min(begin + requests, keys.batch);
    int own = 0;
#pragma unroll 1
    for (int b = begin; b < end; ++b) own += line.stretch(blocks[b]);
    int at = sum_before(own);
    Part seen{keys.batch, -1, 0, 0, 0};
#pragma unroll 1
    for (int b = begin; b < end; ++b) {
      const Line::Share share = line.share(part, at, blocks[b]);
      if (share.any) {
        if (seen.last_request < 0) seen.first_request = b, seen.first_block = share.begin;
        seen.last_request = b, seen.end_block = share.end, seen.blocks += share.blocks();
      }
      if (pieces) pieces[b] = line.pieces(at, share);
      at += line.stretch(blocks[b]);
    }
    const int first = __reduce_min_sync(cuda::kAllLanes, seen.first_request);
    const int last = __reduce_max_sync(cuda::kAllLanes, seen.last_request);
    seen.blocks = __reduce_add_sync(cuda::kAllLanes, seen.blocks);
    if (lane == 0) found = {first, last, 0, 0, seen.blocks};
    __syncwarp();
    if (first <= last && seen.first_request == first) found.first_block = seen.first_block;
    if (first <= last && seen.last_request == last) found.end_block = seen.end_block;
  }
  cuda::fence_async_shared();  // the next in the scratch may be a bulk copy
  __syncthreads();
  return found;
}

}  // namespace dsm::split_kv
