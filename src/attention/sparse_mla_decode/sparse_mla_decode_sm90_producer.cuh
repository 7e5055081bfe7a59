// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"

// Cached rows become tiles of keys.

namespace dsm::sparse_mla_sm90 {

/// The blocks of a part in their order; the position of the block to come.
struct BlockWalk {
  const Problem& p;
  const split_kv::Part& part;
  int request, block = 0, end = 0;
  int first_blocks = 0, count = 0, extra_count = 0;  ///< blocks and keys of the first list, keys of the second

  __device__ BlockWalk(const Problem& problem, const split_kv::Part& of)
      : p(problem), part(of), request(of.first_request - 1) {
    next_request();
  }
  __device__ bool done() const { return request > part.last_request; }
  __device__ void next() {
    if (++block == end) next_request();
  }

 private:
  __device__ void next_request() {
    do {
      if (++request > part.last_request) return;
      const Run run(p, part, request);
      block = run.begin, end = run.end;
    } while (block >= end);
    first_blocks = split_kv::first_blocks(p.keys, request);
    count = split_kv::key_count(p.keys.keys, p.keys.length, request);
    extra_count = split_kv::key_count(p.keys.extra_keys, p.keys.extra_length, request);
  }
};

/// Brings a quarter of a row of each block. The pieces of a row are asked for in two lots, each as soon as that of the
/// row before has been converted, so that most of a row is always on its way; its index a block earlier.
template <class Record, class Extra>
class RowStream {
 public:
  __device__ RowStream(const Problem& problem, const split_kv::Part& part)
      : p_(problem),
        walk_(problem, part),
        row_((threadIdx.x / kWarpgroup - 2) * (kKeys / 2) + threadIdx.x % kWarpgroup / 32 * kRowsPerWarp +
             row_of_lane(lane())) {}

  /// Whether there is a block more, after those whose indices were asked for.
  __device__ bool more() const { return !walk_.done(); }

  __device__ void ask_index() {
    const RowTile tile(p_);
    index_is_extra_ = walk_.block >= walk_.first_blocks;
    const List& list = index_is_extra_ ? p_.extra : p_.list;
    const int at = (walk_.block - (index_is_extra_ ? walk_.first_blocks : 0)) * kKeys + row_;
    const std::int32_t* indices = list.indices + walk_.request * list.of_request + tile.position * list.of_position;
    index_ = at < (index_is_extra_ ? walk_.extra_count : walk_.count) ? indices[at] : -1;
    walk_.next();
  }
  /// The row whose index was asked for is the one to ask for.
  __device__ void turn() {
    next_is_extra_ = index_is_extra_;
    const Cache& cache = next_is_extra_ ? p_.extra.cache : p_.list.cache;
    next_valid_ = cache.has(index_);
    const auto turn_to = [&]<class R>() {
      const auto entry = cache.template entry<R>(index_);
      bytes_ = entry.data;
      load_scales<R>(next_scales_, entry.scales);
    };
    next_is_extra_ ? turn_to.template operator()<Extra>() : turn_to.template operator()<Record>();
  }
  template <int kWhich>
  __device__ void ask() {
    if (std::is_same_v<Record, Extra> || !next_is_extra_)
      load_lot<Record, kWhich>(lots_[kWhich], bytes_, lane());
    else
      load_lot<Extra, kWhich>(lots_[kWhich], bytes_, lane());
  }
  /// The row that was asked for is the one to store.
  __device__ void take() {
#pragma unroll
    for (int i = 0; i < kScales; ++i) scales_[i] = next_scales_[i];
    is_extra_ = next_is_extra_, valid_ = next_valid_;
  }
  template <int kWhich>
  __device__ void store(std::uint32_t tile) const {
    if (std::is_same_v<Record, Extra> || !is_extra_)
      store_lot<Record, kWhich>(lots_[kWhich], scales_, tile, row_, lane());
    else
      store_lot<Extra, kWhich>(lots_[kWhich], scales_, tile, row_, lane());
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
  BlockWalk walk_;
  int row_;
  std::int32_t index_;
  bool valid_, next_valid_, is_extra_, next_is_extra_, index_is_extra_;
  const std::uint8_t* bytes_;
  uint4 lots_[2][std::max(Pieces<Record>::kLot, Pieces<Extra>::kLot)], scales_[kScales], next_scales_[kScales];
};

/// Two warpgroups bring half of each block; nothing waits at the end of a request.
template <class Record, class Extra, int kWidth>
__device__ __forceinline__ void bring_keys(const Problem& p, const split_kv::Part& part, Shared<kWidth>& shared) {
  RowStream<Record, Extra> rows(p, part);
  if (!rows.more()) return;
  rows.ask_index();
  rows.turn();
  rows.template ask<0>();
  rows.template ask<1>();
  bool next = rows.more();
  if (next) rows.ask_index();
  for (Use use;; ++use.n) {
    rows.take();
    const std::uint32_t keys = cuda::shared_address(shared.keys[use.buffer()]);
    shared.empty[use.buffer()].wait(use.parity() ^ 1);
    rows.store_valid(shared.valid[use.buffer()]);
    rows.template store<0>(keys);
    __syncwarp();
    const bool last = !next;
    if (!last) {
      rows.turn();
      rows.template ask<0>();
      next = rows.more();
      if (next) rows.ask_index();
    }
    __syncwarp();
    rows.template store<1>(keys);
    cuda::fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared.full[use.buffer()].arrive();
    if (last) break;
    rows.template ask<1>();
  }
}

}  // namespace dsm::sparse_mla_sm90
