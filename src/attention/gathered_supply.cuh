// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/gathered_columns.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"

// Rows of codes are copied as they are to stages that all warps of a group read: in code for sm_90 and newer by bulk
// copies, which do not hold up what other instructions want of shared memory when memory has much to do. For few query
// rows a warp of its own does so; otherwise all warps do, each for some rows.
namespace dsm::attention {

/// The stages of a group of threads, of which there are one or two. The n-th tile, from 0, is in stage(n), whose use
/// has the parity phase(n).
struct Supply {
  static constexpr int kStages = 2, kTiles = 2 * kStages;

  cuda::MBarrier full[kStages], free[kStages];
  std::uint32_t valid[kTiles];  ///< bit i of those of tile t, t % kTiles: key i exists

#ifdef __CUDACC__
  static __device__ int stage(int n, int stages) { return n & (stages - 1); }
  static __device__ int phase(int n, int stages) { return n >> (stages - 1) & 1; }

  /// By one thread, before a barrier of the block: how many warps copy rows, and how many read them.
  __device__ void init(int writers, int readers) {
    for (int i = 0; i < kStages; ++i) full[i].init(writers * (cuda::kWarpSize + 1)), free[i].init(readers);
#if __CUDA_ARCH__ >= 900
    cuda::fence_barrier_init();
#endif
  }
#endif
};

#ifdef __CUDACC__

/// Begins to copy the rows of the keys [first, first + kCount) to a stage, by a warp whose lane i has the row of the
/// i-th of these. `full`: where the copies arrive. kOnce: hardly any other block reads them.
template <int kCount, bool kOnce>
__device__ __forceinline__ void copy_rows(std::uint8_t* stage, const RowParts& parts, int first, const KeyRow& row,
                                          cuda::MBarrier& full) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  const std::uint32_t to = cuda::shared_address(stage);
  const auto data = reinterpret_cast<std::uint64_t>(row.data);
  const auto row_of = [&](int i) {
    return reinterpret_cast<const std::uint8_t*>(__shfl_sync(cuda::kAllLanes, data, i));
  };
  if (parts.scales_apart && lane < kCount)
    cuda::copy_async<8>(to + parts.at(first + lane) + parts.scales, row.scales, 8);
#if __CUDA_ARCH__ >= 900
  const bool one = cuda::elected();
  const int whole = parts.pieces * kPiece, bytes = min(parts.limit, whole);
  if (one) full.arrive_expecting(kCount * whole);
#pragma unroll 8
  for (int i = 0; i < kCount; ++i) {
    const std::uint8_t* const from = row_of(i);
    if (one)
      cuda::bulk_load(to + parts.at(first + i), from, bytes, full,
                      kOnce ? cuda::L2Hint::kEvictFirst : cuda::L2Hint::kEvictNormal);
  }
  if (bytes < whole && one) {
    for (int i = 0; i < kCount; ++i) cuda::bulk_load(to + parts.at(first + i) + bytes, no_row, whole - bytes, full);
  }
#else
  if (lane == 0) full.arrive();
  const auto copy = [&](int nth, const std::uint8_t* from, int piece) {
    (kOnce ? cuda::copy_async_once : cuda::copy_async<kPiece>)(to + parts.at(first + nth) + piece * kPiece,
                                                               from + piece * kPiece,
                                                               piece * kPiece < parts.limit ? kPiece : 0);
  };
  // What all rows have of codes, neighbouring lanes neighbouring pieces; then what else they have, each lane of its
  // own.
  const int together = parts.fp4 ? 16 : 32, part = parts.fp4 ? lane / 16 : 0, piece = parts.fp4 ? lane % 16 : lane;
#pragma unroll 8
  for (int i = 0; i < kCount; i += cuda::kWarpSize / together) copy(i + part, row_of(i + part), piece);
  if (lane < kCount)
    for (int more = together; more < parts.pieces; ++more) copy(lane, row.data, more);
#endif
  full.arrive_after_copies();
}

/// Has the rows of the tiles [begin, end) copied, by a warp: a lane finds the row of its key, having asked before the
/// tile before what the list says. stage_of(n), parts_of(tile): of the n-th tile, from 0.
template <class StageOf, class PartsOf>
__device__ __forceinline__ void supply_rows(const GatheredAttention& p, const Unit& unit, Supply& supply, int stages,
                                            int begin, int end, const StageOf& stage_of, const PartsOf& parts_of) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  const auto* const zeros = reinterpret_cast<const std::uint8_t*>(no_row);
  std::int32_t fetched = unit.fetch(p, begin, lane);
#pragma unroll 1
  for (int t = begin; t < end; ++t) {
    KeyRow row = unit.row(p, t, lane, fetched);
    const bool exists = row.data != nullptr;
    if (!exists) row = {zeros, zeros};
    const std::uint32_t valid = __ballot_sync(cuda::kAllLanes, exists);
    fetched = unit.fetch(p, t + 1, lane);
    const int n = t - begin, stage = Supply::stage(n, stages);
    if (n == 1) supply.full[0].wait(0);  // what everybody asks for at first is there the sooner
    supply.free[stage].wait(Supply::phase(n, stages) ^ 1);
    if (lane == 0) supply.valid[t % Supply::kTiles] = valid;
    __syncwarp();
    copy_rows<kTileKeys, true>(stage_of(n), parts_of(t), 0, row, supply.full[stage]);
  }
}

#endif

}  // namespace dsm::attention
