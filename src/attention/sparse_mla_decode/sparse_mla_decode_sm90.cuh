// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "src/attention/sparse_mla_decode/cached_rows_sm90.cuh"
#include "src/attention/split_kv.cuh"
#include "src/cuda/ptx/barrier.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"

// What the warpgroups of the sparse decode kernel have in common: the call, shared memory, the blocks of keys.

namespace dsm::sparse_mla_sm90 {

inline constexpr int kWarpgroup = 128;
inline constexpr int kHeads = 64;  // of a thread block
inline constexpr int kKeys = split_kv::kBlockKeys;
inline constexpr int kValues = 512;   // d_v
inline constexpr int kColumns = 256;  // of the output, of one of two warpgroups
inline constexpr int kKeyBuffers = 2;
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// The list of one cache.
struct List {
  Cache cache;
  const std::int32_t* indices;
  std::int64_t of_request, of_position;  ///< strides
  std::int64_t size;                     ///< from the first index to the last one

  /// Asks the L2 for all indices if there are few, by a warpgroup: before it is known which are needed.
  __device__ __forceinline__ void ask_for_few() const {
    constexpr int kLine = 128 / sizeof(std::int32_t);
    const int at = threadIdx.x % kWarpgroup * kLine;
    if (size <= kWarpgroup * kLine && at < size) cuda::prefetch_l2(indices + at);
  }
};

/// A call.
struct Problem {
  const __nv_bfloat16* q;
  std::int64_t q_request, q_position, q_head;  ///< strides
  List list, extra;                            ///< extra is not read when keys.extra_keys == 0
  split_kv::Keys keys;
  split_kv::EqualRequests equal;  ///< if keys.equal()
  split_kv::Workspace pieces;
  const float* attn_sink;
  float scale;  ///< softmax_scale · log2(e)
  int s_q, h_q;
  cuda::Divider head_tiles;
  __nv_bfloat16* out;
  std::int64_t out_request, out_position, out_head;  ///< strides
  float* lse;
};

/// Shared memory of a thread block.
template <int kWidth>
struct Shared {
  static constexpr int kTiles = kWidth / 64;
  static constexpr std::uint32_t kKeyBytes = kTiles * kTileBytes;

  alignas(1024) std::uint8_t keys[kKeyBuffers][kKeyBytes];  // swizzled tiles of 64 columns, as q and weights
  alignas(1024) std::uint8_t q[kKeyBytes];
  alignas(1024) std::uint8_t weights[kTileBytes];
  float factors[kHeads];                       // by which rows of the output are to be multiplied
  std::uint8_t valid[kKeyBuffers][kKeys / 8];  // bit per key
  cuda::MBarrier full[kKeyBuffers], empty[kKeyBuffers];
};

/// Named barriers.
enum : int {
  kMessage = 1,   // factors, and weights if there are keys, are there
  kReceived = 2,  // and have been read
  kScores = 3,    // among the warps that make the scores
};

/// The thread block's rows: heads of one position.
template <int kTileHeads = kHeads>
struct RowTile {
  int position, first_head;

  __device__ explicit RowTile(const Problem& p)
      : position(static_cast<int>(p.head_tiles.quotient(blockIdx.x))),
        first_head(static_cast<int>(blockIdx.x - position * p.head_tiles.divisor()) * kTileHeads) {}

  /// The strip of rows of the pieces (src/attention/split_kv.h) that the warp has, and whether it has any row.
  __device__ int strip(const Problem& p) const {
    constexpr int kRows = split_kv::kStripRows;
    return position * ((p.h_q + kRows - 1) / kRows) + first_strip_head() / kRows;
  }
  __device__ bool has_strip(const Problem& p) const { return first_strip_head() < p.h_q; }

 private:
  /// The only strip of a tile of no more rows is that of all warps.
  __device__ int first_strip_head() const {
    constexpr int kRows = split_kv::kStripRows;
    return first_head + (kTileHeads > kRows ? threadIdx.x % kWarpgroup / 32 * kRows : 0);
  }
};

/// The blocks of keys that a part has of a request.
struct Run {
  int begin, end;
  bool whole;

  __device__ Run(const Problem& p, const split_kv::Part& part, int request)
      : begin(request == part.first_request ? part.first_block : 0) {
    const int all = split_kv::block_count(p.keys, request);
    end = request == part.last_request ? part.end_block : all;
    whole = begin == 0 && end == all;
  }
};

/// Slot of the piece in the workspace, or -1 where the request is finished by this part.
__device__ __forceinline__ int slot_of(const split_kv::Part& part, const Run& run, int request) {
  return run.whole ? -1 : 2 * static_cast<int>(blockIdx.y) + (request != part.first_request);
}

/// Number n of the uses of buffers in turn.
struct Use {
  int n = 0;

  __device__ int buffer() const { return n % kKeyBuffers; }
  __device__ std::uint32_t parity() const { return n / kKeyBuffers % 2; }
};

}  // namespace dsm::sparse_mla_sm90
