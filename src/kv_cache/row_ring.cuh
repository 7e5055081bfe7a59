// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/cuda/ptx/barrier.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"
#include "src/kv_cache/warp_rows.cuh"

// Rows come by bulk copies into shared memory, some rounds before a warp takes them: each warp has a ring of its own,
// so that none waits for another, and loads in flight cost no registers.

namespace dsm {

/// Whether this code's device has bulk copies.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kBulkCopies = true;
#else
inline constexpr bool kBulkCopies = false;
#endif

/// A warp's next rows: kStages times the kRows that it makes at a time.
template <int kRows, int kRowBytes>
class RowRing {
 public:
  static constexpr int kStages = 3;
  struct alignas(128) Shared {
    std::uint8_t rows[kRowWarps][kStages][kRows][kRowBytes];
    cuda::MBarrier landed[kRowWarps][kStages];
  };

  __device__ explicit RowRing(Shared& shared)
      : rows_(shared.rows[threadIdx.x / cuda::kWarpSize]), landed_(shared.landed[threadIdx.x / cuda::kWarpSize]) {}
  /// Begins with the first rounds; `fetch(round)` fetches one.
  template <class Fetch>
  __device__ __forceinline__ void begin(const Fetch& fetch) {
    if (cuda::elected()) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) landed_[stage].init(1);
    }
    cuda::fence_barrier_init();
    __syncwarp();
#pragma unroll
    for (int round = 0; round < kStages; ++round) fetch(round);
  }
  /// All lanes begin to fetch the rows of a round, if there are any; they have taken those of `round - kStages`.
  /// `copy(token, to, landed)` issues the copies of a row.
  template <class Copy>
  __device__ __forceinline__ void fetch(int round, const WarpRows& rows, const Copy& copy) {
    const int first = round * kRows, count = min(kRows, rows.size() - first), stage = round % kStages;
    if (count <= 0) return;
    const bool issues = cuda::elected();
    if (issues) landed_[stage].arrive_expecting(count * kRowBytes);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t token = rows.token(first + i);
      if (i < count && issues) copy(token, cuda::shared_address(rows_[stage][i]), landed_[stage]);
    }
  }
  __device__ __forceinline__ void await(int round) { landed_[round % kStages].wait(round / kStages & 1); }
  template <class T>
  __device__ __forceinline__ const T* row(int round, int i) const {
    return reinterpret_cast<const T*>(rows_[round % kStages][i]);
  }

 private:
  std::uint8_t (*rows_)[kRows][kRowBytes];
  cuda::MBarrier* landed_;
};

/// In place of a ring where none is used.
struct NoRing {
  struct Shared {};
  static constexpr int kStages = 0;
  __device__ explicit NoRing(Shared&) {}
  template <class Fetch>
  __device__ void begin(const Fetch&) {}
  __device__ void await(int) {}
  template <class Copy>
  __device__ void fetch(int, const WarpRows&, const Copy&) {}
  template <class T>
  __device__ const T* row(int, int) const {
    return nullptr;
  }
};

}  // namespace dsm
