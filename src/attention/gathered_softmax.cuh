// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "src/attention/gathered_products.cuh"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/ptx/arithmetic.cuh"

// The online softmax between the products. A row belongs to kLanes neighbouring threads, each with some keys of a tile.
namespace dsm::attention {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// Weights, up to 2^RowState::kSlack, are multiplied by this, so that float16 has small ones, too, with enough bits.
template <class T>
inline constexpr float kWeightUnit = std::is_same_v<T, float16> ? 0x1p7f : 1.f;

/// A thread's keys are in runs of neighbours: run r of the lane-th thread of a row begins with first_key(lane, r).
template <class L>
struct Keys {
  static constexpr int kRun = L::kKeysOfLane < 4 ? L::kKeysOfLane : 4, kRuns = L::kKeysOfLane / kRun;

  static __device__ int first_key(int run) { return run * (L::kLanes * kRun) + threadIdx.x % L::kLanes * kRun; }
};

/// The thread's scores, times `scale`, of row threadIdx.x / kLanes of the block. −inf where there is no key (bit i of
/// `valid` says whether key i exists) or from `seen` on.
template <class L>
__device__ __forceinline__ void read_scores(const float* scores, std::uint32_t valid, int seen, float scale,
                                            float (&s)[L::kKeysOfLane]) {
  constexpr int kRun = Keys<L>::kRun;
  const int row = threadIdx.x / L::kLanes;
  if (seen < kTileKeys) valid &= (1u << max(seen, 0)) - 1;
#pragma unroll
  for (int run = 0; run < Keys<L>::kRuns; ++run) {
    const int first = Keys<L>::first_key(run);
    cuda::Pack<float, kRun> sum{};
#pragma unroll
    for (int warp = 0; warp < L::kWarps; ++warp) {
      const auto part = cuda::load_pack<kRun>(scores + warp * L::kRows * kTileKeys + score_at(row, first));
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum.at[j] += part.at[j];
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) s[run * kRun + j] = valid >> (first + j) & 1 ? sum.at[j] * scale : -INFINITY;
  }
}

template <class T>
__device__ __forceinline__ float2 widened_pair(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  else
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

/// A row's softmax so far, in the unit of log2. Weights are relative to `base`, which follows the maximum only when
/// that gets 2^kSlack times as large, so that sums seldom have to be rescaled.
struct RowState {
  static constexpr float kSlack = 8;
  float most = -INFINITY, base = -INFINITY, sum = 0;  ///< most, sum: perhaps of the thread's own keys alone
};

/// Continues the softmax of the thread's row with its scores, and stores their weights in that unit; what is to be done
/// with earlier sums.
template <class T, class L, bool kScaled>
__device__ __forceinline__ float weigh(const float (&s)[L::kKeysOfLane], float unit, const float* scales,
                                       RowState& state, T* weights) {
  constexpr int kTerms = L::kTerms;
  constexpr int kKeys = L::kKeysOfLane, kRun = Keys<L>::kRun;
  const int row = threadIdx.x / L::kLanes;
  float most = s[0];
#pragma unroll
  for (const float score : s) most = fmaxf(most, score);
  state.most = fmaxf(state.most, most);
  float rescale = 1;
  const auto too_large = [&] { return state.most > state.base + RowState::kSlack; };
  if (__any_sync(cuda::kAllLanes, too_large())) {
    state.most = cuda::lane_group_max(state.most, L::kLanes);
    if (too_large()) {
      rescale = cuda::power_of_two(state.base - state.most);
      state.base = state.most;
    }
  }
  const float base = state.base == -INFINITY ? 0 : state.base;  // no key yet
  float sum = 0, p[kKeys];
#pragma unroll
  for (int j = 0; j < kKeys; ++j) {
    p[j] = cuda::power_of_two(s[j] - base);
    sum += p[j];
  }
  state.sum = state.sum * rescale + sum;
#pragma unroll
  for (int group = 0; group < (kScaled ? kScaleGroups : 1); ++group) {
#pragma unroll
    for (int run = 0; run < Keys<L>::kRuns; ++run) {
      const int first = Keys<L>::first_key(run);
      cuda::Pack<std::uint32_t, kRun / 2> terms[kTerms];
#pragma unroll
      for (int j = 0; j < kRun; j += 2) {
        float x = p[run * kRun + j] * unit, y = p[run * kRun + j + 1] * unit;
        if constexpr (kScaled) {
          const float2 scale = *reinterpret_cast<const float2*>(scales + group * kTileKeys + first + j);
          x *= scale.x, y *= scale.y;
        }
#pragma unroll
        for (auto& term : terms) {
          term.at[j / 2] = cuda::rounded_pair<T>(x, y);
          const float2 rounded = widened_pair<T>(term.at[j / 2]);
          x -= rounded.x, y -= rounded.y;
        }
      }
      T* const to = weights + group * kTerms * L::kWeights + row * kWeightStride + first;
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
        cuda::store_pack(reinterpret_cast<std::uint32_t*>(to + term * L::kWeights), terms[term]);
    }
  }
  return rescale;
}

}  // namespace dsm::attention
