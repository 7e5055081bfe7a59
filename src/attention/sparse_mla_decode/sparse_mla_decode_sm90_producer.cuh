// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"

// Cached rows become tiles of keys.

namespace dsm::sparse_mla_sm90 {

/// Warps that bring rows of a block.
template <class Record>
inline constexpr int kBringingWarps = 2 * kWarpgroup / 32;

/// The indices of a part's blocks in their order, of one row of each block.
class IndexWalk {
 public:
  __device__ IndexWalk(const Problem& p, const split_kv::Part& part, int row)
      : p_(p), part_(part), row_(row), list_(2 * part.first_request - 1) {}

  /// The index of the row in the next block, -1 beyond the list's end; false: there is no block more.
  __device__ bool next(std::int32_t& index) {
    if (blocks_ == 0) next_list();
    if (blocks_ == 0) return false;
    index = keys_ > 0 ? *at_ : -1;
    at_ += kKeys, keys_ -= kKeys, --blocks_;
    return true;
  }
  /// Of which list that index is.
  __device__ bool extra() const { return list_ % 2; }

 private:
  __device__ void next_list() {
#pragma unroll 1
    while (true) {
      const int request = ++list_ / 2;
      if (request > part_.last_request) return;
      const int count = split_kv::key_count(p_.keys.keys, p_.keys.length, request);
      const int before = extra() ? split_kv::blocks_of(count) : 0;
      keys_ = extra() ? split_kv::key_count(p_.keys.extra_keys, p_.keys.extra_length, request) : count;
      const int begin = max((request == part_.first_request ? part_.first_block : 0) - before, 0),
                all = split_kv::blocks_of(keys_),
                end = request == part_.last_request ? min(part_.end_block - before, all) : all;
      if (begin >= end) continue;
      const List& list = extra() ? p_.extra : p_.list;
      const int first = begin * kKeys + row_;
      blocks_ = end - begin;
      keys_ -= first;
      at_ = list.indices + request * list.of_request + RowTile(p_).position * list.of_position + first;
      return;
    }
  }

  const Problem& p_;
  const split_kv::Part& part_;
  int row_, list_;
  int blocks_ = 0;  ///< of the list, to come
  int keys_;        ///< of the list, from the row of the next block on
  const std::int32_t* at_;
};

/// Runs `run` for the record of the rows of one of the two lists.
template <class Record, class Extra, class Run>
__device__ __forceinline__ void of_record(bool extra, Run run) {
  if (std::is_same_v<Record, Extra> || !extra)
    run.template operator()<Record>();
  else
    run.template operator()<Extra>();
}

/// Rows that one tile of queries reads alone are not needed again.
__device__ __forceinline__ cuda::L2Hint row_hint() {
  return gridDim.x == 1 ? cuda::L2Hint::kEvictFirst : cuda::L2Hint::kEvictNormal;
}

/// Brings a quarter of a row of each block. The pieces of a row are asked for in two lots, where kAsksEarly each as
/// soon as that of the row before has been converted, so that most of a row is always on its way; its index a block
/// earlier.
template <class Record, class Extra>
class RowStream {
 public:
  __device__ RowStream(const Problem& problem, const split_kv::Part& part)
      : p_(problem),
        row_((threadIdx.x / kWarpgroup - 2) * (kKeys / 2) + threadIdx.x % kWarpgroup / 32 * kRowsPerWarp +
             row_of_lane(lane())),
        walk_(problem, part, row_),
        hint_(row_hint()) {}

  /// Asks for the index in the next block, if there is one.
  __device__ bool ask_index() {
    const bool more = walk_.next(index_);
    index_is_extra_ = walk_.extra();
    return more;
  }
  /// The row whose index was asked for is the one to ask for.
  __device__ void turn() {
    next_is_extra_ = index_is_extra_;
    const Cache& cache = next_is_extra_ ? p_.extra.cache : p_.list.cache;
    next_valid_ = cache.has(index_);
    of_record<Record, Extra>(next_is_extra_, [&]<class R>() {
      const auto entry = cache.template entry<R>(index_);
      bytes_ = entry.data;
      load_scales<R>(next_scales_, entry.scales);
    });
  }
  template <int kWhich>
  __device__ void ask() {
    of_record<Record, Extra>(next_is_extra_,
                             [&]<class R>() { load_lot<R, kWhich>(lots_[kWhich], CachedRow{bytes_, hint_}, lane()); });
  }
  /// The row that was asked for is the one to store.
  __device__ void take() {
#pragma unroll
    for (int i = 0; i < kScales; ++i) scales_[i] = next_scales_[i];
    is_extra_ = next_is_extra_, valid_ = next_valid_;
  }
  template <int kWhich>
  __device__ void store(std::uint32_t tile) const {
    of_record<Record, Extra>(is_extra_,
                             [&]<class R>() { store_lot<R, kWhich>(lots_[kWhich], scales_, tile, row_, lane()); });
  }
  /// Which of the warp's rows are any.
  __device__ void store_valid(std::uint8_t* valid) const {
    const unsigned rows = __reduce_or_sync(cuda::kAllLanes, static_cast<unsigned>(valid_) << row_ % kRowsPerWarp);
    if (lane() == 0) valid[row_ / kRowsPerWarp] = static_cast<std::uint8_t>(rows);
  }

 private:
  static constexpr int kScales = std::max(Pieces<Record>::kScales, Pieces<Extra>::kScales);

  __device__ static int lane() { return threadIdx.x % 32; }
  const Problem& p_;
  int row_;
  IndexWalk walk_;
  const cuda::L2Hint hint_;
  std::int32_t index_;
  const std::uint8_t* bytes_;
  bool valid_, next_valid_, is_extra_, next_is_extra_, index_is_extra_;
  uint4 lots_[2][std::max(Pieces<Record>::kLot, Pieces<Extra>::kLot)], scales_[kScales], next_scales_[kScales];
};

/// Whether a row's first lot is asked for before the second one of the row before has been stored: with V4 15 % faster
/// at 128 heads and 3 % at 64, with V4.1 3 %; with V3.2 2 to 4 % slower, with NVFP4 4, with a second cache of FP4 16
/// (L2 flushed by writing; flushed by reading, V3.2 is as fast).
template <class Record, class Extra>
inline constexpr bool kAsksEarly = Record::kWidth == kValues && std::is_same_v<Record, Extra>;

/// Two warpgroups bring half of each block; nothing waits at the end of a request. Each turn of the loop stores a
/// block, asks for the rows of the next one and for the indices of the one after it, as far as there are any: all three
/// stand here once, because a call begins with instructions that no cache has.
template <class Record, class Extra, int kWidth>
__device__ __forceinline__ void bring_keys(const Problem& p, const split_kv::Part& part, Shared<kWidth>& shared) {
  RowStream<Record, Extra> rows(p, part);
  Use use;
  bool stores = false, asks = false, next;
#pragma unroll 1
  do {
    const std::uint32_t keys = cuda::shared_address(shared.keys[use.buffer()]);
    const auto store_rest = [&] {
      rows.template store<1>(keys);
      cuda::fence_async_shared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared.full[use.buffer()].arrive();
      ++use.n;
    };
    if (stores) {
      rows.take();
      shared.empty[use.buffer()].wait(use.parity() ^ 1);
      rows.store_valid(shared.valid[use.buffer()]);
      rows.template store<0>(keys);
      if constexpr (!kAsksEarly<Record, Extra>) store_rest();
    }
    __syncwarp();
    if (asks) {
      rows.turn();
      rows.template ask<0>();
      if constexpr (!kAsksEarly<Record, Extra>) rows.template ask<1>();
    }
    next = rows.ask_index();
    if constexpr (kAsksEarly<Record, Extra>) {
      __syncwarp();
      if (stores) store_rest();
      if (asks) rows.template ask<1>();
    }
    stores = asks, asks = next;
  } while (stores || asks);
}

}  // namespace dsm::sparse_mla_sm90
