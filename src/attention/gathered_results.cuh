// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/gathered_softmax.cuh"

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
  return {Parts<float>(p.work(), launch), multiple(p.out, 4) && multiple(p.d_v, 2) &&
                                              multiple(p.out_strides.request, 2) && multiple(p.out_strides.query, 2) &&
                                              multiple(p.out_strides.head, 2)};
}

#ifdef __CUDACC__

/// Of E4M3 rows; 1 of others. Read when it is needed: registers are scarce.
__device__ __forceinline__ float k_scale(const GatheredAttention& p) {
  return p.k_scale ? *static_cast<const volatile float*>(p.k_scale) : 1.f;
}

/// Stores the outputs and states of the block's rows, from first_row to last_row. `factors`: a number of each row.
template <class T, class L>
__device__ __forceinline__ void store_results(const GatheredAttention& p, const Destination& to, const Unit& unit,
                                              int first_row, int last_row, const RowState& state,
                                              const Outputs<T, L>& outputs, float* factors) {
  const int own_row = threadIdx.x / L::kLanes;
  const bool whole = to.parts.count == 1;
  const std::int64_t first_part_row = blockIdx.y * to.parts.rows + unit.number * p.rows() + first_row;
  // Of the sums relative to the base to the state relative to the maximum.
  const float to_most = state.base == -INFINITY ? 0 : cuda::power_of_two(state.base - state.most);
  const float sum = cuda::lane_group_sum(state.sum, L::kLanes) * to_most, m = state.most * kLn2;
  const float unit_factor = k_scale(p) / kWeightUnit<T>;
  __syncthreads();
  if (threadIdx.x % L::kLanes == 0 && first_row + own_row <= last_row) {
    const int row = first_row + own_row;
    if (whole) {
      store_statistics(p, unit.request, unit.query_of(row), unit.head_of(row), m, sum);
      factors[own_row] = output_factor(p, unit.head_of(row), m, sum) * to_most * unit_factor;
    } else {
      float* const of_row = to.parts.states + 2 * (first_part_row + own_row);
      of_row[0] = m, of_row[1] = sum, factors[own_row] = to_most * unit_factor;
    }
  }
  __syncthreads();
  const int d_v = static_cast<int>(p.d_v);
  outputs.visit(d_v, [&](int row_of_block, int column, float x, float y) {
    const int row = first_row + row_of_block;
    if (row > last_row) return;
    const float factor = factors[row_of_block];
    if (!whole) {
      float* const at = to.parts.out + (first_part_row + row_of_block) * to.parts.stride + column;
      *reinterpret_cast<float2*>(at) = {x * factor, y * factor};
      return;
    }
    cuda::Pack<T, 2> pack{};
    if (factor != 0) pack = __builtin_bit_cast(decltype(pack), cuda::rounded_pair<T>(x * factor, y * factor));
    T* const at = pointer<T>(p.out, p.out_strides.at(unit.request, unit.query_of(row), unit.head_of(row)) + column);
    if (to.even) {
      cuda::store_pack(at, pack);
    } else {
      at[0] = pack.at[0];
      if (column + 1 < d_v) at[1] = pack.at[1];
    }
  });
}

#endif

}  // namespace dsm::attention
