// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/mla_decode/mla_decode_sm90.cuh"
#include "src/cuda/copy/element.cuh"
#include "src/cuda/ptx/arithmetic.cuh"

namespace dsm::dense_decode {

using cuda::Major;

/// Whether one of eight elements is an infinity or NaN.
template <class T>
__device__ __forceinline__ bool has_special(const uint4& x) {
  constexpr std::uint32_t kExponents = std::is_same_v<T, __nv_bfloat16> ? 0x7f807f80u : 0x7c007c00u;
  const auto special = [](std::uint32_t pair) { return __vcmpeq2(pair & kExponents, kExponents); };
  return (special(x.x) | special(x.y) | special(x.z) | special(x.w)) != 0;
}

/// One of the two warpgroups that compute. A thread has two rows of the tile, of which it holds the columns that
/// src/cuda/ptx/wgmma.cuh says.
template <class T, bool kPair>
class Consumer {
 public:
  __device__ Consumer(const Params& params, Shared& shared, int part_slot, int first_request, int first_row, int rank)
      : params_(params),
        shared_(shared),
        part_slot_(part_slot),
        first_request_(first_request),
        first_row_(first_row),
        rank_(rank) {
    // By a shuffle, so that the compiler knows that all of a warp have the same.
    group_ = __shfl_sync(cuda::kAllLanes, threadIdx.x / kWarpgroup, 0);
    lane_ = threadIdx.x % 32;
    row_ = threadIdx.x % kWarpgroup / 32 * 16 + lane_ / 4;
    idle_ = first_row + row_ / 16 * 16 >= params.rows;
    // Keys that the tile's first query does not see.
    hidden_ = params.causal ? params.s_q - 1 - first_row / params.h_q : 0;
  }

  __device__ void run(const split_kv::Part& part);

 private:
  /// Where a row of a request begins in out and lse.
  struct Place {
    std::int64_t out, lse;
  };
  __device__ Place place_of(int request, int row) const {
    const int position = static_cast<int>(params_.heads.quotient(static_cast<std::uint32_t>(row))),
              head = row - position * params_.h_q;
    return {request * params_.out_batch + position * params_.out_position + head * params_.out_head,
            (std::int64_t{request} * params_.h_q + head) * params_.s_q + position};
  }

  __device__ int row(int i) const { return row_ + 8 * i; }
  /// Arrives once for the warp.
  __device__ void release(cuda::MBarrier& barrier) const {
    if (lane_ == 0) barrier.arrive();
  }

  /// Has read a quarter of the values in a buffer; both blocks of a pair must know, as they copy for each other.
  __device__ void release_quarter(int buffer, int quarter) const {
    release(shared_.k_empty[buffer][group_ * 2 + quarter]);
    if (kPair && lane_ == 0) shared_.k_empty[buffer][group_ * 2 + quarter].arrive_at(1 - rank_);
  }

  /// S += Q K of quarters [kFrom, kTo) in their order of use, the last tile counting as one. In flight when it returns,
  /// as one group.
  template <int kFrom, int kTo>
  __device__ void multiply_qk(int n);
  /// O += P V with the other warpgroup's P. Before: O is idle. In flight when it returns, as two groups.
  __device__ void add_others(int n, const Block& block);
  /// O += P V with this warpgroup's P, O having been of the reference points `before`. Before: O is idle. In flight
  /// when it returns, as two groups.
  __device__ void add_own(int n, const Block& block, const float (&before)[2]);
  /// Masks S and raises the rows' reference points to their largest scores. So the largest weight is exactly 1, and
  /// only smaller ones are rounded: with points that lag, the error grows by 1 to 3 %, where one key has nearly all the
  /// weight by that of a rounding.
  __device__ void find_references(const Block& block);
  /// P from S; `before`: the reference points until now.
  __device__ void exponentiate(const float (&before)[2]);
  /// P where the warp has no rows.
  __device__ void clear_weights();
  /// Lets the other warpgroup have P and the rows' state.
  __device__ void publish(int n, const Block& block);
  /// Values behind the last key become 0: whatever they are, they must not meet P. So do chunks that are not finite of
  /// keys from `seen` on, which some rows do not see: the P of who sees them is NaN already.
  __device__ void clear_values(int n, int seen, int keys_of_block);
  /// Half of O's columns from reference points to the rows' own ones, while the product of the other half is in flight.
  __device__ void scale_values(int quarter, const float (&before)[2]);
  /// O divided by the sum of the exponentials, and lse; of the request, by way of this warpgroup's half of the buffer,
  /// which nobody needs any more, or of what the part computes of it.
  __device__ void store(int n, const Block& block, const float (&m)[2], const float (&l)[2]);

  const Params& params_;
  Shared& shared_;
  const int part_slot_, first_request_, first_row_, rank_;
  int group_, lane_, row_, hidden_;
  bool idle_;  ///< the warp has no rows: its P is 0, which costs the products less power than other numbers
  float o_[2][64], s_[32];
  std::uint32_t p_[4][4];  ///< by steps of 16 keys
  float m_[2], l_[2];      ///< of the blocks that are in O, or in S and O
};

template <class T, bool kPair>
template <int kFrom, int kTo>
__device__ __forceinline__ void Consumer<T, kPair>::multiply_qk(int n) {
  const int buffer = n & 1, parity = n >> 1 & 1;
  const std::uint64_t q = cuda::k_major(shared_.q), k = cuda::k_major(shared_.k[buffer]);
#pragma unroll
  for (int i = kFrom; i < kTo; ++i) {
    const int part = i < kQuarters ? i ^ buffer * 2 : i;  // the half comes first that is released first
    shared_.k_full[buffer][part].wait(parity);
    cuda::wgmma_fence();
#pragma unroll
    for (int step = 0; step < (i < kQuarters ? 8 : 4); ++step) {
      const std::uint32_t at = (2 * part + step / 4) * kTileBytes + step % 4 * 32;
      cuda::wgmma_m64n64<T, Major::k>(s_, cuda::advanced(q, at), cuda::advanced(k, at), i + step > 0);
    }
  }
  cuda::wgmma_commit();
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::add_others(int n, const Block& block) {
  const int buffer = n & 1;
  const float before[2] = {m_[0], m_[1]};
  const RowState state = shared_.rows[buffer][threadIdx.x % kWarpgroup];
  m_[0] = state.m[0], m_[1] = state.m[1], l_[0] = state.l[0], l_[1] = state.l[1];
  const std::uint64_t p = cuda::k_major(shared_.k[buffer][kTiles - 1].bytes);
  const std::uint64_t v = cuda::n_major(shared_.k[buffer][group_ * kHalf].bytes, kTileBytes);
#pragma unroll
  for (int quarter = 0; quarter < 2; ++quarter) {
    if (!(block.is & Block::kFirst)) scale_values(quarter, before);
    cuda::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      cuda::wgmma_m64n128<T, Major::n>(o_[quarter], cuda::advanced(p, step * 32),
                                       cuda::advanced(v, quarter * 2 * kTileBytes + step * 2048),
                                       step > 0 || !(block.is & Block::kFirst));
    cuda::wgmma_commit();
  }
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::add_own(int n, const Block& block, const float (&before)[2]) {
  const std::uint64_t v = cuda::n_major(shared_.k[n & 1][group_ * kHalf].bytes, kTileBytes);
#pragma unroll
  for (int quarter = 0; quarter < 2; ++quarter) {
    if (!(block.is & Block::kFirst)) scale_values(quarter, before);
    cuda::wgmma_registers(o_[quarter]);
    cuda::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      cuda::wgmma_m64n128<T, Major::n>(o_[quarter], p_[step], cuda::advanced(v, quarter * 2 * kTileBytes + step * 2048),
                                       step > 0 || !(block.is & Block::kFirst));
    }
    cuda::wgmma_commit();
  }
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::scale_values(int quarter, const float (&before)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!__any_sync(cuda::kAllLanes, before[i] != m_[i])) continue;
    const float factor = before[i] == m_[i] ? 1.f : cuda::power_of_two(before[i] - m_[i]);
#pragma unroll
    for (int j = 0; j < 64; j += 4) {
      o_[quarter][j + 2 * i] *= factor;
      o_[quarter][j + 2 * i + 1] *= factor;
    }
  }
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::find_references(const Block& block) {
  const int begin = block.index * kRows;
  if (begin + kRows > block.keys - hidden_) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = static_cast<int>(params_.heads.quotient(static_cast<std::uint32_t>(first_row_ + row(i))));
      const int visible = (params_.causal ? block.keys - params_.s_q + 1 + position : block.keys) - begin;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (8 * j + lane_ % 4 * 2 + k >= min(visible, block.keys - begin)) s_[4 * j + 2 * i + k] = -INFINITY;
    }
  }
  if (block.is & Block::kFirst) m_[0] = m_[1] = -INFINITY, l_[0] = l_[1] = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float tops[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) tops[j] = fmaxf(s_[4 * j + 2 * i], s_[4 * j + 2 * i + 1]);
#pragma unroll
    for (int j = 4; j > 0; j /= 2)
#pragma unroll
      for (int k = 0; k < j; ++k) tops[k] = fmaxf(tops[k], tops[k + j]);
    float top = fmaxf(tops[0], __shfl_xor_sync(cuda::kAllLanes, tops[0], 1));
    top = fmaxf(top, __shfl_xor_sync(cuda::kAllLanes, top, 2)) * params_.scale;
    m_[i] = top > m_[i] ? top : m_[i];
  }
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::exponentiate(const float (&before)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float reference = m_[i] == -INFINITY ? 0.f : m_[i];
    float sums[2] = {l_[i] == 0 ? 0.f : l_[i] * cuda::power_of_two(before[i] - m_[i]), 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float low = cuda::power_of_two(fmaf(s_[4 * j + 2 * i], params_.scale, -reference));
      const float high = cuda::power_of_two(fmaf(s_[4 * j + 2 * i + 1], params_.scale, -reference));
      sums[0] += low, sums[1] += high;
      p_[j / 2][j % 2 * 2 + i] = cuda::rounded_pair<T>(low, high);
    }
    l_[i] = sums[0] + sums[1];
  }
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::clear_weights() {
#pragma unroll
  for (auto& step : p_)
#pragma unroll
    for (std::uint32_t& pair : step) pair = 0;
  m_[0] = m_[1] = l_[0] = l_[1] = 0;
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::publish(int n, const Block& block) {
  const int buffer = n & 1, keys = block.keys - block.index * kRows;
  const std::uint32_t to =
      cuda::shared_address(&shared_.k[buffer][kTiles - 1]) + cuda::swizzled(row_ / 16 * 16 + lane_ % 16, lane_ / 16);
  cuda::named_sync(3 + buffer, kWarpgroup);  // all warps have read the keys
#pragma unroll
  for (int step = 0; step < 4; ++step) cuda::store_fragment(to ^ step << 5, p_[step]);
  shared_.rows[buffer][threadIdx.x % kWarpgroup] = {{m_[0], m_[1]}, {l_[0], l_[1]}};
  if (keys - hidden_ < kRows) clear_values(n, max(keys - hidden_, 0), keys);
  cuda::fence_async_shared();
  cuda::named_arrive(1 + buffer, 2 * kWarpgroup);
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::clear_values(int n, int seen, int keys_of_block) {
  const int thread = threadIdx.x % kWarpgroup;
#pragma unroll 1
  for (int at = seen * 128 + thread * 16; at < kTileBytes; at += kWarpgroup * 16)
#pragma unroll 1
    for (int tile = 0; tile < 2 * kHalf; ++tile) {
      uint4& chunk = *reinterpret_cast<uint4*>(shared_.k[n & 1][tile].bytes + at);
      if (at >= keys_of_block * 128 || has_special<T>(chunk)) chunk = uint4{};
    }
  cuda::fence_async_shared();
  cuda::named_sync(3 + (n & 1), kWarpgroup);  // this warpgroup's own product needs all of it
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::store(int n, const Block& block, const float (&m)[2],
                                                          const float (&l)[2]) {
  const int warp = threadIdx.x % kWarpgroup / 32, column = group_ * kHalf * 64, quad = lane_ % 4;
  const int warp_row = first_row_ + warp * 16, rows = min(params_.rows - warp_row, 16);
  const int slot = part_slot_ + (block.request != first_request_);
  // 16 rows of 512 bytes, whose chunks of 16 are swizzled.
  std::uint8_t* stage = shared_.k[n & 1][group_ * kHalf + warp].bytes;
  const auto staged = [&](int of_warp, int chunk) { return stage + of_warp * 512 + ((chunk ^ of_warp % 8) << 4); };
  float sums[2], factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[i] = cuda::lane_group_sum(l[i], 4);
    factor[i] = sums[i] == 0 ? 0 : 1 / sums[i];  // 0: no keys
  }
  if (block.is & Block::kWhole) {
    cuda::named_sync(3 + group_, kWarpgroup);  // all warps have read the values
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float* o = &o_[j / 16][j % 16 * 4 + 2 * i];
        *reinterpret_cast<std::uint32_t*>(staged(lane_ / 4 + 8 * i, j) + quad * 4) =
            cuda::rounded_pair<T>(o[0] * factor[i], o[1] * factor[i]);
      }
    cuda::fence_async_shared();  // before copies into the buffer
    __syncwarp();
#pragma unroll 2
    for (int of_warp = 0; of_warp < rows; ++of_warp) {
      const Place place = place_of(block.request, warp_row + of_warp);
      reinterpret_cast<uint4*>(static_cast<T*>(params_.out) + place.out + column)[lane_] =
          *reinterpret_cast<const uint4*>(staged(of_warp, lane_));
    }
  } else if (rows > 0) {
    split_kv::store_values(params_.workspace, slot, warp_row / split_kv::kStripRows, group_, o_);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int of_warp = lane_ / 4 + 8 * i;
    if (group_ != 0 || quad != 0 || of_warp >= rows) continue;
    if (block.is & Block::kWhole)
      params_.lse[place_of(block.request, warp_row + of_warp).lse] =
          sums[i] == 0 ? INFINITY : (m[i] + __log2f(sums[i])) * static_cast<float>(M_LN2);
    else
      split_kv::store_state(params_.workspace, slot, warp_row / split_kv::kStripRows, of_warp, m[i], sums[i]);
  }
  __syncwarp();
}

template <class T, bool kPair>
__device__ __forceinline__ void Consumer<T, kPair>::run(const split_kv::Part& part) {
  if (part.blocks == 0) return;
  const auto await_others = [&] { cuda::named_sync(2 - group_, 2 * kWarpgroup); };
  bool mine = true;
  if (group_ == 1) {
    shared_.k_full[0][2].wait(0);  // released by this warpgroup alone: the phase cannot pass by
    mine = shared_.blocks[0].is & Block::kNext;
  }
  bool behind = group_ == 1;  // the block before is the other warpgroup's and not yet added
  int n = group_;
  for (; mine; n += 2) {
    shared_.k_full[group_][group_ * 2].wait(n >> 1 & 1);
    const Block own = shared_.blocks[n & 3], others = shared_.blocks[(n - 1) & 3];
    const bool first = own.is & Block::kFirst, last = own.is & Block::kLast;
    const bool others_last = behind && others.is & Block::kLast;
    // Q of this piece is copied when the other warpgroup is done with Q of the piece before.
    if (behind && first) await_others();
    shared_.q_full.wait(own.is & Block::kOddPiece ? 1 : 0);
    const bool frees = behind && !others_last;
    cuda::wgmma_wait<0>();  // nothing is in flight, but the compiler would serialise the products if it were not told
    multiply_qk<0, 2>(n);
    if (behind && !first) await_others();
    // Where there is no block before, its product is overwritten.
    add_others(n - 1, others);
    cuda::wgmma_wait<1>();
    if (frees) release_quarter(1 - group_, 0);  // before the wait for keys that are copied when both have released
    multiply_qk<2, 3>(n);
    cuda::wgmma_wait<1>();
    if (frees) release_quarter(1 - group_, 1);
    multiply_qk<3, kQuarters + 1>(n);
    cuda::wgmma_wait<0>();
    cuda::wgmma_registers(s_);
    if (last) release(shared_.q_empty);
    const float m[2] = {m_[0], m_[1]}, l[2] = {l_[0], l_[1]};
    if (idle_) {
      clear_weights();
    } else {
      find_references(own);
      exponentiate(m);
    }
    publish(n, own);
    if (others_last) {
      store(n - 1, others, m, l);
      release_quarter(1 - group_, 0);
      release_quarter(1 - group_, 1);
    }
    add_own(n, own, m);
    cuda::wgmma_wait<1>();
    if (!last) release_quarter(group_, 0);
    cuda::wgmma_wait<0>();
    if (last) {
      store(n, own, m_, l_);
      release_quarter(group_, 0);
    }
    release_quarter(group_, 1);
    behind = own.is & Block::kNext;
    mine = own.is & Block::kNextButOne;
  }
  if (behind) {
    await_others();
    const Block others = shared_.blocks[(n - 1) & 3];
    add_others(n - 1, others);
    cuda::wgmma_wait<0>();
    store(n - 1, others, m_, l_);
  }
}

}  // namespace dsm::dense_decode
