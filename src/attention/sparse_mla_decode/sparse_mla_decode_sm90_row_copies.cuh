// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_producer.cuh"
#include "src/cuda/copy/async.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"

// Whole rows are copied to shared memory, where there is room, by warps of their own: memory that has much to do holds
// up nobody else. Eight other warps turn them into tiles of keys, unless who multiplies takes them as they are.

namespace dsm::sparse_mla_sm90 {

inline constexpr int kConverters = kKeys / kRowsPerWarp;  // warps, each of which has an eighth of all blocks
inline constexpr int kCopiers = 2;                        // warps, each lane of which has a row copied

/// What a row has in one place: all of it, or all but its scales.
template <class Record>
inline constexpr std::uint32_t kRowBytes = Record::kBytes;
template <class Record>
  requires requires { Record::kDataBytes; }
inline constexpr std::uint32_t kRowBytes<Record> = Record::kDataBytes;
template <class Record>
inline constexpr bool kScalesInRow = requires { Record::kScalesAt; };

/// Half of a block's rows, as they are in the cache. Rows four places apart are 64 bytes and a multiple of 128 apart:
/// the lanes of two such rows meet in no bank.
template <class Record, class Extra>
struct CopiedRows {
  static constexpr std::uint32_t kScaleBytes = kScalesInRow<Record> ? 0 : 8;  // that follow a row here alone
  static constexpr std::uint32_t kStride =
      (std::max(kRowBytes<Record>, kRowBytes<Extra>) + kScaleBytes + 15) / 32 * 32 + 16;
  static_assert(kScalesInRow<Record> == kScalesInRow<Extra>);

  alignas(16) std::uint8_t bytes[32][kStride];
  std::uint32_t valid;  ///< bit per place
  bool extra;           ///< rows of the second list
  cuda::MBarrier landed, free;

  /// `readers`: warps that let go of it.
  __device__ void init(int readers) {
    landed.init(kScalesInRow<Record> ? 1 : 1 + 32);
    free.init(readers);
  }
};

/// Has every kWarps-th of the halves of all blocks copied, by warp `warp` of so many: a lane finds the row of its
/// place, whose index it asked for before it began the half before. await_barriers(): until `shared` has begun.
template <class Record, class Extra, int kWarps, class S, class Wait>
__device__ __forceinline__ void copy_rows(const Problem& p, const split_kv::Part& part, S& shared, int warp,
                                          Wait await_barriers) {
  const int lane = threadIdx.x % 32, lane_of_place = lane % 4 * 8 + lane / 4 % 2 * 4;
  IndexWalk walk(p, part, warp % 2 * 32 + lane / kRowsPerWarp * kRowsPerWarp + row_of_lane(lane_of_place));
  const cuda::L2Hint hint = row_hint();
  std::int32_t index;
  const auto next = [&](int blocks) {
    bool there = true;
    for (int i = 0; i < blocks; ++i) there = there && walk.next(index);
    return there;
  };
  bool more = next(1 + warp / 2);
  await_barriers();
#pragma unroll 1
  for (int n = warp; more; n += kWarps) {
    const bool extra = walk.extra();
    of_record<Record, Extra>(extra, [&]<class R>() {
      const Cache& cache = extra ? p.extra.cache : p.list.cache;
      const unsigned valid = __ballot_sync(cuda::kAllLanes, cache.has(index));
      const auto entry = cache.template entry<R>(index);
      more = next(kWarps / 2);
      auto& rows = shared.rows[n % S::kRows];
      rows.free.wait(n / S::kRows % 2 ^ 1);
      if constexpr (!kScalesInRow<R>) {
        cuda::copy_async<8>(cuda::shared_address(rows.bytes[lane]) + kRowBytes<R>, entry.scales, 8);
        rows.landed.arrive_after_copies();
      }
      const bool one = cuda::elected();
      if (one) {
        rows.valid = valid, rows.extra = extra;
        rows.landed.arrive_expecting(32 * kRowBytes<R>);
      }
#pragma unroll 8
      for (int i = 0; i < 32; ++i) {
        const std::uint64_t from = __shfl_sync(cuda::kAllLanes, reinterpret_cast<std::uint64_t>(entry.data), i);
        if (one)
          cuda::bulk_load(cuda::shared_address(rows.bytes[i]), reinterpret_cast<const void*>(from), kRowBytes<R>,
                          rows.landed, hint);
      }
    });
  }
}

/// Turns an eighth of the rows of all blocks into keys, by warp `warp` of kConverters. Columns come in two lots.
template <class Record, class Extra, class S>
__device__ __forceinline__ void convert_rows(const split_kv::Part& part, S& shared, int warp) {
  constexpr int kWarps = kConverters / kCopiers;  // to half a block
  const int lane = threadIdx.x % 32, row = warp * kRowsPerWarp + row_of_lane(lane);
  const int place = warp % kWarps * kRowsPerWarp + lane / 4 % 2 * 4 + lane / 8;
#pragma unroll 1
  for (Use use; use.n < part.blocks; ++use.n) {
    const int n = use.n * kCopiers + warp / kWarps, buffer = use.buffer();
    auto& rows = shared.rows[n % S::kRows];
    rows.landed.wait(n / S::kRows % 2);
    const bool valid = rows.valid >> place & 1;
    const std::uint32_t from = cuda::shared_address(rows.bytes[place]),
                        keys = cuda::shared_address(shared.keys[buffer]);
    of_record<Record, Extra>(rows.extra, [&]<class R>() {
      uint4 lots[2][Pieces<R>::kLot], scales[Pieces<R>::kScales];
      if constexpr (kScalesInRow<R>)
        load_scales<R>(scales, from + R::kScalesAt);
      else
        load_half_piece(scales[0], from + kRowBytes<R>);
      load_lot<R, 0>(lots[0], from, lane);
      load_lot<R, 1>(lots[1], from, lane);
      __syncwarp();
      if (lane == 0) rows.free.arrive();
      const auto publish = [&](cuda::MBarrier& full) {
        cuda::fence_async_shared();
        __syncwarp();
        if (lane == 0) full.arrive();
      };
      shared.empty[buffer][0].wait(use.parity() ^ 1);
      const unsigned valid_rows = __reduce_or_sync(cuda::kAllLanes, static_cast<unsigned>(valid) << row % kRowsPerWarp);
      if (lane == 0) shared.valid[buffer][warp] = static_cast<std::uint8_t>(valid_rows);
      store_lot<R, 0>(lots[0], scales, keys, row, lane);
      publish(shared.full[buffer][0]);
      shared.empty[buffer][1].wait(use.parity() ^ 1);
      store_lot<R, 1>(lots[1], scales, keys, row, lane);
      publish(shared.full[buffer][1]);
    });
  }
}

}  // namespace dsm::sparse_mla_sm90
