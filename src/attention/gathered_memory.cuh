// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>

#include "src/attention/gathered_results.cuh"
#include "src/cuda/launch/launch.h"

// How gathered_mma_cuda.cu divides the work between warps, and its dynamic shared memory.
namespace dsm::attention {

/// Dynamic shared memory of a group of threads: stages; the warps' columns of a tile as 16-bit elements, unless the
/// stages are; scores; weights; queries of many rows; OfGroup. At the end, a group of few rows has its outputs where
/// stages and tiles were.
struct Memory {
  Stage stage;
  int stages, tiles_at, scores_at, weights_at, queries_at, own_at, bytes;
};

inline bool scaled(const GatheredAttention& p) {
  return p.pools[0].format == RowFormat::v32_fp8 || (p.pool_count > 1 && p.pools[1].format == RowFormat::v32_fp8);
}

/// Elements of few rows leave warps room for two slices, which halves what does not depend on the columns. Plain ones
/// rather have more warps.
template <int M, bool kPlain>
using LayoutOf = Layout<M, M == 1 && !kPlain ? 2 : 1>;
/// Whether a warp of its own brings the rows.
template <int M, bool kPlain>
inline constexpr bool supplied = M == 1 && !kPlain;
template <int M, bool kPlain>
inline constexpr int threads_of = LayoutOf<M, kPlain>::kThreads + (supplied<M, kPlain> ? cuda::kWarpSize : 0);
/// Groups of threads that are to run on a processor at the same time, in one block or in as many.
template <int M>
inline constexpr int kGroups = M > 1 ? 1 : kFewBlocks;

/// Whether all keys are elements of the queries' dtype.
inline bool plain(const GatheredAttention& p) {
  return p.pools[0].format == RowFormat::plain && (p.pool_count < 2 || p.pools[1].format == RowFormat::plain);
}

inline Stage stage_of(const GatheredAttention& p) {
  Stage stage{0};
  for (int i = 0; i < p.pool_count && !plain(p); ++i)
    stage.stride = std::max(stage.stride, row_parts(p.pools[i].format, static_cast<int>(p.d_qk)).stride);
  return stage;
}

template <class L>
Memory memory_of(const GatheredAttention& p, int stages) {
  Memory memory{};
  memory.stage = stage_of(p);
  memory.stages = stages;
  memory.tiles_at = stages * memory.stage.bytes();
  memory.scores_at = memory.tiles_at + (plain(p) ? 0 : (kSlices + 1) * kSliceBytes);
  memory.weights_at = memory.scores_at + L::kScoreBytes;
  memory.queries_at = memory.weights_at + L::kTerms * L::kWeights * 2 * (scaled(p) ? kScaleGroups : 1);
  memory.own_at = memory.queries_at + L::kQueryBytes;
  memory.bytes = static_cast<int>(memory.own_at + (sizeof(OfGroup<L>) + 127) / 128 * 128);
  return memory;
}

/// As many groups on a processor; beside what kernels declare themselves, less 1 KB that the limit has for it.
inline bool fits(const Memory& memory, int groups = 1) {
  constexpr std::size_t kOwn = 2 * 1024;
  return (static_cast<std::size_t>(memory.bytes) + kOwn) * groups <= cuda::shared_bytes_limit("attention");
}

/// Groups that run at the same time on a processor, as far as registers allow.
template <int M>
int groups_of(const Memory& memory) {
  int groups = 0;
  while (groups < kGroups<M> && fits(memory, groups + 1)) ++groups;
  return groups;
}

/// Two stages, or one of codes where two would leave room for fewer groups.
template <int M>
Memory best_memory(const GatheredAttention& p) {
  if (plain(p)) return memory_of<LayoutOf<M, true>>(p, 2);
  const Memory one = memory_of<LayoutOf<M, false>>(p, 1), two = memory_of<LayoutOf<M, false>>(p, 2);
  return groups_of<M>(two) > 0 && groups_of<M>(two) >= groups_of<M>(one) ? two : one;
}

}  // namespace dsm::attention
