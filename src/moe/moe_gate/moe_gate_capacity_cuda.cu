// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// The capacity limit, in three kernels whose result does not depend on any order of execution: how often each chunk of
// tokens names each expert, the sum of that over the chunks before, and each pair's rank = that sum + the pairs before
// it in its own chunk. Then the weights, which may depend on what was kept.
#include "src/cuda/launch/launch.h"
#include "src/cuda/reduce/warp.cuh"
#include "src/moe/moe_gate/moe_gate.h"

namespace dsm {
namespace {

using cuda::kWarpSize;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPairsPerWarp = kCapacityChunkPairs / kWarps;
constexpr int kPairsPerThread = kCapacityChunkPairs / kThreads;

/// The pairs of a block: whole tokens, as many as kCapacityChunkPairs pairs allow.
struct Chunk {
  std::int64_t first_token;
  int tokens, pairs;

  __device__ Chunk(std::int64_t all_tokens, int topk) {
    const int most = kCapacityChunkPairs / topk;
    first_token = std::int64_t{blockIdx.x} * most;
    tokens = static_cast<int>(min(std::int64_t{most}, all_tokens - first_token));
    pairs = tokens * topk;
  }
};

/// counts [chunks, experts]
__global__ void __launch_bounds__(kThreads) moe_gate_count_cuda_kernel(const std::int32_t* indices, std::int64_t tokens,
                                                                       int topk, int experts, std::int32_t* counts) {
  __shared__ std::int32_t count[kMaxCudaExperts];
  const Chunk chunk(tokens, topk);
  for (int e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < chunk.pairs; i += kThreads) atomicAdd(&count[indices[chunk.first_token * topk + i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[std::int64_t{blockIdx.x} * experts + e] = count[e];
}

/// Replaces each count by the sum of the counts of the chunks before: 32 experts a block, 32 runs of chunks.
__global__ void __launch_bounds__(kWarpSize* kWarpSize)
    moe_gate_scan_cuda_kernel(std::int32_t* counts, std::int64_t chunks, int experts) {
  __shared__ std::int32_t run_sums[kWarpSize][kWarpSize + 1];
  const int expert = blockIdx.x * kWarpSize + threadIdx.x;
  const std::int64_t run = (chunks + kWarpSize - 1) / kWarpSize;
  const std::int64_t begin = threadIdx.y * run, end = expert < experts ? min(begin + run, chunks) : begin;
  std::int32_t sum = 0;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) sum += counts[chunk * experts + expert];
  run_sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  std::int32_t before = 0;
  for (int y = 0; y < threadIdx.y; ++y) before += run_sums[y][threadIdx.x];
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    std::int32_t& count = counts[chunk * experts + expert];
    const std::int32_t here = count;
    count = before;
    before += here;
  }
}

/// Marks the pairs whose rank within their expert is beyond the capacity, and turns scores into weights.
template <class T>
__global__ void __launch_bounds__(kThreads)
    moe_gate_drop_cuda_kernel(const std::int32_t* counts_before, std::int64_t tokens, int topk, int experts,
                              std::int64_t capacity, Normalize normalize, T factor, T* weights, std::int32_t* indices) {
  extern __shared__ std::int32_t seen[];  // [kWarps, experts]: first by the warp, then before the warp
  const Chunk chunk(tokens, topk);
  weights += chunk.first_token * topk;
  indices += chunk.first_token * topk;
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) seen[i] = 0;
  __syncthreads();

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  std::int32_t expert[kPairsPerThread], rank[kPairsPerThread];
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i) {
    const int pair = warp * kPairsPerWarp + i * kWarpSize + lane;
    expert[i] = pair < chunk.pairs ? indices[pair] : -1;
    const unsigned same = __match_any_sync(cuda::kAllLanes, expert[i]);
    const unsigned earlier = same & ((1u << lane) - 1);
    if (expert[i] >= 0) rank[i] = seen[warp * experts + expert[i]] + __popc(earlier);
    __syncwarp();
    if (expert[i] >= 0 && earlier == 0) seen[warp * experts + expert[i]] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    std::int32_t before = counts_before[std::int64_t{blockIdx.x} * experts + e];
    for (int w = 0; w < kWarps; ++w) {
      const std::int32_t here = seen[w * experts + e];
      seen[w * experts + e] = before;
      before += here;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPairsPerThread; ++i) {
    if (expert[i] < 0 || seen[warp * experts + expert[i]] + rank[i] < capacity) continue;
    indices[warp * kPairsPerWarp + i * kWarpSize + lane] = -1 - expert[i];
  }
  __syncthreads();

  for (int token = threadIdx.x; token < chunk.tokens; token += kThreads) {
    T* w = weights + token * topk;
    const std::int32_t* index = indices + token * topk;
    T sum = normalize == Normalize::none ? T(1) : static_cast<T>(kGateEpsilon);
    if (normalize != Normalize::none)
      for (int k = 0; k < topk; ++k)
        if (index[k] >= 0 || normalize == Normalize::selected) sum += w[k];
    for (int k = 0; k < topk; ++k) w[k] = index[k] < 0 ? T(0) : w[k] / sum * factor;
  }
}

template <class T>
void drop(const MoeGateArgs& a, const Launch& launch, dim3 grid, const std::int32_t* counts_before) {
  const int experts = static_cast<int>(a.logits.size(1)), topk = static_cast<int>(a.weights.size(1));
  cuda::launch("moe_gate", moe_gate_drop_cuda_kernel<T>, grid, dim3(kThreads), sizeof(std::int32_t) * kWarps * experts,
               launch, counts_before, a.logits.size(0), topk, experts, a.capacity_rows, a.normalize,
               static_cast<T>(a.routed_scaling_factor), a.weights.as<T>(), a.indices.as<std::int32_t>());
}

}  // namespace

void moe_gate_capacity_cuda(const MoeGateArgs& a, const Launch& launch) {
  const std::int64_t tokens = a.logits.size(0), chunks = capacity_chunks(a);
  const int experts = static_cast<int>(a.logits.size(1)), topk = static_cast<int>(a.weights.size(1));
  auto* counts = static_cast<std::int32_t*>(launch.workspace);
  cuda::launch("moe_gate", moe_gate_count_cuda_kernel, dim3(chunks), dim3(kThreads), 0, launch,
               a.indices.as<const std::int32_t>(), tokens, topk, experts, counts);
  cuda::launch("moe_gate", moe_gate_scan_cuda_kernel, dim3(cuda::ceil_div(experts, kWarpSize)),
               dim3(kWarpSize, kWarpSize), 0, launch, counts, chunks, experts);
  a.logits.dtype == DType::float64 ? drop<double>(a, launch, dim3(chunks), counts)
                                   : drop<float>(a, launch, dim3(chunks), counts);
}

}  // namespace dsm
