// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/gathered_rows.cuh"
#include "src/attention/gathered_softmax.cuh"
#include "src/attention/gathered_supply.cuh"
#include "src/cuda/ptx/barrier.cuh"

// What a block of gathered_mma_cuda.cu does when it has seen all its keys.
namespace dsm::attention {

/// Where results are stored: in the call's tensors, or in the workspace where keys are split.
struct Destination {
  Parts<float> parts;
  bool even;  ///< pairs of outputs can be stored at once
};

inline bool multiple(std::int64_t value, std::int64_t of) { return value % of == 0; }
inline bool multiple(const void* pointer, std::int64_t of) {
  return multiple(reinterpret_cast<std::intptr_t>(pointer), of);
}

inline Destination destination(const GatheredAttention& p, const Launch& launch) {
  return {Parts<float>(p, launch), multiple(p.out, 4) && multiple(p.d_v, 2) && multiple(p.out_strides.request, 2) &&
                                       multiple(p.out_strides.query, 2) && multiple(p.out_strides.head, 2)};
}

#ifdef __CUDACC__

/// Of E4M3 rows; 1 of others. Read when it is needed: registers are scarce.
__device__ __forceinline__ float k_scale(const GatheredAttention& p) {
  return p.k_scale ? *static_cast<const volatile float*>(p.k_scale) : 1.f;
}

/// What a group of threads has in shared memory beside tiles, scores and weights.
template <class L>
struct OfGroup {
  typename TileRows<L::kWarps>::Storage rows;
  float scales[kScaleGroups * kTileKeys];
  float factors[L::kRows];
  float2 states[L::kRows];  ///< maximum, in the unit of log2, and sum
  Supply supply;            ///< of codes and few rows
  int end;                  ///< the first tile that is not its own any more
};

/// Stores the outputs and states of the block's rows, from first_row to last_row, of the keys of all its groups, whose
/// shared memory begins every group_bytes and has OfGroup at own_at.
template <class T, class L>
__device__ __forceinline__ void store_results(const GatheredAttention& p, const Destination& to, const Unit& unit,
                                              int first_row, int last_row, const RowState& state,
                                              Outputs<T, L>& outputs, std::uint8_t* shared, int group_bytes,
                                              int own_at) {
  const auto of_group = [&](unsigned group) -> OfGroup<L>& {
    return *reinterpret_cast<OfGroup<L>*>(shared + group * group_bytes + own_at);
  };
  const unsigned group = threadIdx.y, groups = blockDim.y;
  const int own_row = threadIdx.x / L::kLanes, row = first_row + own_row;
  const bool whole = to.parts.count == 1;
  const std::int64_t first_part_row = blockIdx.y * to.parts.rows + unit.number * p.rows() + first_row;
  // Of the sums relative to the base to the state relative to the maximum.
  const auto relative = [](float from, float most) { return from == -INFINITY ? 0 : cuda::power_of_two(from - most); };
  const float own_most = cuda::lane_group_max(state.most, L::kLanes);
  const float own_sum = cuda::lane_group_sum(state.sum, L::kLanes) * relative(state.base, own_most);
  if (threadIdx.x % L::kLanes == 0) of_group(group).states[own_row] = {own_most, own_sum};
  __syncthreads();
  if (threadIdx.x % L::kLanes == 0) {
    float most = -INFINITY, sum = 0;
    for (unsigned i = 0; i < groups; ++i) most = fmaxf(most, of_group(i).states[own_row].x);
    for (unsigned i = 0; i < groups; ++i) {
      const float2 its = of_group(i).states[own_row];
      if (its.y != 0) sum += its.y * relative(its.x, most);
    }
    float factor = relative(state.base, most) * k_scale(p) / kWeightUnit<T>;
    if (row <= last_row) {
      if (whole) {
        factor *= output_factor(p, unit.head_of(row), most * kLn2, sum);
        if (group == 0) store_statistics(p, unit.request, unit.query_of(row), unit.head_of(row), most * kLn2, sum);
      } else if (group == 0) {
        float* const of_row = to.parts.states + 2 * (first_part_row + own_row);
        of_row[0] = most * kLn2, of_row[1] = sum;
      }
    }
    of_group(group).factors[own_row] = factor;
  }
  cuda::named_sync(group + 1, L::kThreads);
  outputs.finish(of_group(group).factors);
  if (groups > 1) {
    if (group > 0) outputs.give(reinterpret_cast<float4*>(shared + group * group_bytes));
    __syncthreads();
    if (group > 0) return;
#pragma unroll 1
    for (unsigned i = 1; i < groups; ++i) outputs.take(reinterpret_cast<const float4*>(shared + i * group_bytes));
  }
  const int d_v = static_cast<int>(p.d_v);
  if (!whole) {
    outputs.visit(d_v, [&](int row_of_block) {
      float* const of_row = to.parts.out + (first_part_row + row_of_block) * to.parts.stride;
      const bool inside = first_row + row_of_block <= last_row;
      return [=](int column, float x, float y) {
        if (inside) *reinterpret_cast<float2*>(of_row + column) = {x, y};
      };
    });
    return;
  }
  outputs.visit(d_v, [&, even = to.even](int row_of_block) {
    const int its = first_row + row_of_block;
    const bool inside = its <= last_row;
    T* const of_row =
        inside ? pointer<T>(p.out, p.out_strides.at(unit.request, unit.query_of(its), unit.head_of(its))) : nullptr;
    return [=](int column, float x, float y) {
      if (!inside) return;
      const auto pack = __builtin_bit_cast(cuda::Pack<T, 2>, cuda::rounded_pair<T>(x, y));
      if (even) {
        cuda::store_pack(of_row + column, pack);
      } else {
        of_row[column] = pack.at[0];
        if (column + 1 < d_v) of_row[column + 1] = pack.at[1];
      }
    };
  });
}

#endif

}  // namespace dsm::attention
