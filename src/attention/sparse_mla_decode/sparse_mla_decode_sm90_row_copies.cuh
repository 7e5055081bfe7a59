// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_producer.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"

// Cached rows become tiles of keys by way of shared memory, where there is room: whole rows are copied there, which
// asks memory for them at once and leaves no request to the lanes that turn them into keys.

namespace dsm::sparse_mla_sm90 {

/// What a row has in one place: all of it, or all but its scales.
template <class Record>
inline constexpr std::uint32_t kRowBytes = Record::kBytes;
template <class Record>
  requires requires { Record::kDataBytes; }
inline constexpr std::uint32_t kRowBytes<Record> = Record::kDataBytes;
template <class Record>
inline constexpr bool kScalesInRow = requires { Record::kScalesAt; };

/// The rows of a block that a warp brings, as they are in the cache. Neighbours are 64 bytes and a multiple of 128
/// apart: the lanes of two rows meet in no bank.
template <class Record, class Extra>
struct alignas(128) RawRows {
  static constexpr std::uint32_t kStride = (std::max(kRowBytes<Record>, kRowBytes<Extra>) + 63) / 128 * 128 + 64;

  std::uint8_t bytes[kRowsPerWarp][kStride];
  cuda::MBarrier landed;
};

/// Brings a quarter of a row of each block: its warp copies eight rows as soon as those of the block before are in
/// registers, and asks for the indices a block earlier.
template <class Record, class Extra>
class RowCopies : public OwnRow<Record, Extra> {
  using Own = OwnRow<Record, Extra>;
  using Own::kScales, Own::lane;
  using Own::p_, Own::row_, Own::index_, Own::lots_, Own::scales_, Own::next_scales_;
  using Own::valid_, Own::next_valid_, Own::is_extra_, Own::next_is_extra_, Own::index_is_extra_;

 public:
  __device__ RowCopies(const Problem& problem, const split_kv::Part& part, RawRows<Record, Extra>& raw, int warp)
      : Own(problem, part, warp * kRowsPerWarp + row_of_lane(lane())), raw_(raw) {}

  /// Has the rows whose indices were asked for copied.
  __device__ void copy() {
    next_is_extra_ = index_is_extra_;
    const Cache& cache = next_is_extra_ ? p_.extra.cache : p_.list.cache;
    next_valid_ = cache.has(index_);
    Own::of_record(next_is_extra_, [&]<class R>() {
      const auto entry = cache.template entry<R>(index_);
      if constexpr (!kScalesInRow<R>) load_scales<R>(next_scales_, entry.scales);
      const auto row = reinterpret_cast<std::uint64_t>(entry.data);
      const bool one = cuda::elected();
      if (one) raw_.landed.arrive_expecting(kRowsPerWarp * kRowBytes<R>);
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        const std::uint64_t from = __shfl_sync(cuda::kAllLanes, row, i * kLanesPerRow);
        if (one)
          cuda::bulk_load(cuda::shared_address(raw_.bytes[i]), reinterpret_cast<const void*>(from), kRowBytes<R>,
                          raw_.landed);
      }
    });
  }
  /// Takes copy number n when it is there, so that the next one can follow.
  __device__ void take(int n) {
    raw_.landed.wait(n % 2);
    is_extra_ = next_is_extra_, valid_ = next_valid_;
    const std::uint32_t from = cuda::shared_address(raw_.bytes[lane() / kLanesPerRow]);
    Own::of_record(is_extra_, [&]<class R>() {
      if constexpr (kScalesInRow<R>) {
        load_scales<R>(scales_, from + R::kScalesAt);
      } else {
#pragma unroll
        for (int i = 0; i < kScales; ++i) scales_[i] = next_scales_[i];
      }
      load_lot<R, 0>(lots_[0], from, lane());
      load_lot<R, 1>(lots_[1], from, lane());
    });
    cuda::fence_async_shared();
    __syncwarp();
  }
  __device__ void store(std::uint32_t tile) const {
    Own::of_record(is_extra_, [&]<class R>() {
      store_lot<R, 0>(lots_[0], scales_, tile, row_, lane());
      store_lot<R, 1>(lots_[1], scales_, tile, row_, lane());
    });
  }

 private:
  RawRows<Record, Extra>& raw_;
};

/// Warp `warp` of eight that bring an eighth of each block; nothing waits at the end of a request.
template <class Record, class Extra, class S>
__device__ __forceinline__ void bring_copied_keys(const Problem& p, const split_kv::Part& part, S& shared, int warp) {
  RowCopies<Record, Extra> rows(p, part, shared.rows[warp], warp);
  if (!rows.ask_index()) return;
  rows.copy();
  bool next = rows.ask_index();
  for (Use use;; ++use.n) {
    rows.take(use.n);
    const bool last = !next;
    if (!last) {
      rows.copy();
      next = rows.ask_index();
    }
    shared.empty[use.buffer()].wait(use.parity() ^ 1);
    rows.store_valid(shared.valid[use.buffer()]);
    rows.store(cuda::shared_address(shared.keys[use.buffer()]));
    cuda::fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared.full[use.buffer()].arrive();
    if (last) break;
  }
}

}  // namespace dsm::sparse_mla_sm90
