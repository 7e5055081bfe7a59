// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_producer.cuh"
#include "src/cuda/copy/swizzled_rows.cuh"

// Rows of a bfloat16 cache are keys as they are: copied asynchronously, a whole row at a time, 74 KB on their way to
// each multiprocessor. Bound by the warpgroups that use them, which take some 4500 cycles for a block of 64 keys of 576
// columns; the memory could bring it in 4100.
//
// H200, batch 128, us end to end, beside the limit max(bytes / 4.3 TB/s, FLOP / 740 TFLOPS) and the portable kernel:
// 2048 rows of 576 columns: 16 heads 92.8 (71; 98.5), 64 97.0 (74; 219), 128 168 (99; 418); 128 + 512 of 512: 16 heads
// 41.6 (20; 46.6), 64 44.7 (21; 90.8), 128 66.1 (29; 162).

namespace dsm::sparse_mla_sm90 {

/// A record of bfloat16 values alone.
template <int kValuesOfRow>
struct PlainRow {
  static constexpr int kWidth = kValuesOfRow, kBytes = 2 * kWidth, kScalesAt = kBytes;
};

template <int kWidth>
inline constexpr int kBringingWarps<PlainRow<kWidth>> = kWarpgroup / 32;

/// Each of two warpgroups has a buffer, which it fills again as soon as that is free, so that rows of the next block
/// are asked for before those of this one have landed.
template <class Record, class Extra, int kWidth>
  requires std::is_same_v<Record, PlainRow<kWidth>>
__device__ __forceinline__ void bring_keys(const Problem& p, const split_kv::Part& part, Shared<kWidth>& shared) {
  static_assert(std::is_same_v<Record, Extra> && kKeyBuffers == 2);
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
  Use use{static_cast<int>(threadIdx.x) / kWarpgroup - 2};
  IndexWalk walk(p, part, warp * cuda::SourceRows::kOfWarp + lane % cuda::SourceRows::kOfWarp);
  std::int32_t index;  // lanes l and l + 16 know that of the warp's row l
  for (bool more = walk.next(index) && (use.n == 0 || walk.next(index)); more; use.n += kKeyBuffers) {
    const Cache& cache = walk.extra() ? p.extra.cache : p.list.cache;
    const void* const own = cache.has(index) ? cache.template entry<Record>(index).data : nullptr;
    cuda::SourceRows rows;
#pragma unroll
    for (int i = 0; i < cuda::SourceRows::kCount; ++i)
      rows.at[i] = reinterpret_cast<const void*>(
          __shfl_sync(cuda::kAllLanes, reinterpret_cast<unsigned long long>(own), cuda::SourceRows::row_of_warp(i)));
    const unsigned valid = __ballot_sync(cuda::kAllLanes, own != nullptr);
    more = walk.next(index) && walk.next(index);

    shared.empty[use.buffer()].wait(use.parity() ^ 1);
    cuda::copy_rows<0, Shared<kWidth>::kTiles>(shared.keys[use.buffer()], rows, zero_row);
    if (lane == 0)
      reinterpret_cast<std::uint16_t*>(shared.valid[use.buffer()])[warp] = static_cast<std::uint16_t>(valid);
    cuda::end_copy_group();
    cuda::await_copy_groups<0>();
    cuda::fence_async_shared();
    __syncwarp();
    if (lane == 0) shared.full[use.buffer()].arrive();
  }
}

}  // namespace dsm::sparse_mla_sm90
