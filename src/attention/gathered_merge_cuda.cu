// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Merging is bound by latency: a few parts of some rows, just written, are still in L2 cache. A warp has 128 columns of
// a row, or, of many parts, eight warps share these, whose sums are added in order.
#include <cmath>

#include "src/attention/gathered_cuda.cuh"
#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/ptx/barrier.cuh"
#include "src/cuda/reduce/warp.cuh"

namespace dsm::attention {
namespace {

constexpr int kWarps = 8, kFewParts = 4;
constexpr int kColumnsOfLane = 4, kColumns = kColumnsOfLane * cuda::kWarpSize;

/// Maximum and sum of a row over all parts, the same in all lanes.
template <class A>
__device__ SoftmaxState<A> whole_state(const Parts<A>& parts, std::int64_t row) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  A most = -kInfinity<A>, sum = 0;
  for (int i = lane; i < parts.count; i += cuda::kWarpSize) {
    const A m = parts.states[2 * (i * parts.rows + row)];
    most = m > most ? m : most;
  }
  most = cuda::warp_max(most);
  for (int i = lane; i < parts.count; i += cuda::kWarpSize) {
    const A* state = parts.states + 2 * (i * parts.rows + row);
    sum += softmax_rescale(state[0], most) * state[1];
  }
  return {most, cuda::lane_group_sum(sum)};
}

template <class T>
__global__ void __launch_bounds__(kWarps* cuda::kWarpSize)
    merge_gathered_cuda_kernel(const __grid_constant__ GatheredAttention p, Parts<Compute<T>> parts, int warps_of_row) {
  using A = Compute<T>;
  constexpr int kPack = cuda::kPackSize<A>;
  __shared__ A sums[kWarps][kColumnsOfLane][cuda::kWarpSize];
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
  const bool alone = warps_of_row == 1;
  const int turn = alone ? 0 : warp;
  const std::int64_t own_row = alone ? std::int64_t{blockIdx.x} * kWarps + warp : blockIdx.x;
  const std::int64_t row = min(own_row, parts.rows - 1);
  const std::int64_t column = std::int64_t{blockIdx.y} * kColumns + lane * kColumnsOfLane;
  cuda::await_previous_kernel();
  const SoftmaxState<A> state = whole_state(parts, row);

  A sum[kColumnsOfLane] = {};
  if (column < p.d_v) {
#pragma unroll 4
    for (int i = turn; i < parts.count; i += warps_of_row) {
      const std::int64_t part_row = i * parts.rows + row;
      if (parts.states[2 * part_row + 1] == A(0)) continue;
      const A weight = softmax_rescale(parts.states[2 * part_row], state.m);
#pragma unroll
      for (int j = 0; j < kColumnsOfLane; j += kPack) {
        const auto pack = cuda::load_pack<kPack>(parts.out + part_row * parts.stride + column + j);
#pragma unroll
        for (int k = 0; k < kPack; ++k) sum[j + k] += weight * pack.at[k];
      }
    }
  }
  if (!alone) {
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) sums[warp][j][lane] = sum[j];
    __syncthreads();
    if (turn != 0) return;
    for (int other = 1; other < warps_of_row; ++other) {
#pragma unroll
      for (int j = 0; j < kColumnsOfLane; ++j) sum[j] += sums[warp + other][j][lane];
    }
  }

  if (own_row >= parts.rows) return;
  const auto number = static_cast<std::uint32_t>(p.per_unit.quotient_of_any(row));
  const Unit unit(p, number, 0);
  const int row_of_unit = static_cast<int>(row - std::int64_t{number} * p.per_unit.divisor());
  const int query = unit.query_of(row_of_unit), head = unit.head_of(row_of_unit);
  if (blockIdx.y == 0 && lane == 0) store_statistics(p, unit.request, query, head, state.m, state.l);
  const A factor = output_factor(p, head, state.m, state.l);
  T* const out = pointer<T>(p.out, p.out_strides.at(unit.request, query, head));
#pragma unroll
  for (int j = 0; j < kColumnsOfLane; ++j)
    if (column + j < p.d_v) out[column + j] = cuda::narrowed<T>(factor == A(0) ? A(0) : sum[j] * factor);
}

void merge_parts(const char* operation, const GatheredAttention& p, const Launch& launch) {
  const auto columns = static_cast<unsigned>(std::max<std::int64_t>(cuda::ceil_div<std::int64_t>(p.d_v, kColumns), 1));
  cpu::visit_floating(p.dtype, [&]<class T>() {
    const Parts<Compute<T>> parts(p, launch);
    const int warps_of_row = parts.count <= kFewParts ? 1 : kWarps;
    const dim3 grid(static_cast<unsigned>(cuda::ceil_div<std::int64_t>(parts.rows * warps_of_row, kWarps)), columns);
    cuda::launch_dependent(operation, merge_gathered_cuda_kernel<T>, grid, dim3(kWarps * cuda::kWarpSize), 0, launch, p,
                           parts, warps_of_row);
  });
}

}  // namespace

void attend_gathered_cuda(const char* operation, const GatheredAttention& problem, const Launch& launch) {
  GatheredAttention p = problem;
  p.set_dividers();
  p.plan = p.work().plan();
  const bool mma = fits_gathered_mma(p);
  (mma ? attend_gathered_mma : attend_gathered_fma)(operation, p, launch);
  if (p.plan.splits > 1) merge_parts(operation, p, launch);
  if (p.key_probs && p.pools[0].listed > 0) (mma ? key_probs_mma : key_probs_fma)(operation, p, launch);
}

}  // namespace dsm::attention
