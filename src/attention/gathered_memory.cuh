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
/// Groups of threads that are to run on a processor at the same time, in one block or in as many.
template <int M, bool kPlain>
inline constexpr int kGroups = M > 1 ? 1 : (kPlain ? 2 : 3);

/// Bytes of a key in a slice, of the format that has most of them; 0: all are elements.
inline int code_bytes(const GatheredAttention& p) {
  bool plain = true;
  int most = 0;
  for (int i = 0; i < p.pool_count; ++i) {
    const RowFormat format = p.pools[i].format;
    const bool elements = format == RowFormat::plain;
    const bool fp4 = format == RowFormat::v32_nvfp4 || format == RowFormat::v41_fp4;
    plain = plain && elements;
    most = std::max(most, kMainBytes / (elements ? 1 : fp4 ? 4 : 2));
  }
  return plain ? 0 : most;
}

template <class L>
Memory memory_of(const GatheredAttention& p, int stages) {
  Memory memory{};
  memory.stage.code_bytes = code_bytes(p);
  const bool plain = memory.stage.code_bytes == 0;
  memory.stages = stages;
  memory.tiles_at = stages * memory.stage.bytes();
  memory.scores_at = memory.tiles_at + (plain ? 0 : kSlices * kSliceBytes);
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
template <int M, bool kPlain>
int groups_of(const Memory& memory) {
  int groups = 0;
  while (groups < kGroups<M, kPlain> && fits(memory, groups + 1)) ++groups;
  return groups;
}

/// Two stages, or one of codes where two would leave room for fewer groups.
template <int M>
Memory best_memory(const GatheredAttention& p) {
  if (code_bytes(p) == 0) return memory_of<LayoutOf<M, true>>(p, 2);
  const Memory one = memory_of<LayoutOf<M, false>>(p, 1), two = memory_of<LayoutOf<M, false>>(p, 2);
  return groups_of<M, false>(two) > 0 && groups_of<M, false>(two) >= groups_of<M, false>(one) ? two : one;
}

}  // namespace dsm::attention
