// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda.h>

#include <cstdint>

#include "src/attention/split_kv.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/ptx/barrier.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"
#include "src/cuda/ptx/wgmma.cuh"

// A block of threads computes 64 query rows of the requests of its part (src/attention/split_kv.h). Keys come in blocks
// of 64, which two buffers hold in turn; warpgroup i owns the blocks in buffer i. Both warpgroups add up all blocks, in
// order, each for one half of the output's columns. The owner of block i computes
//
//   S = Q K_i of half of the columns  |  O += P_{i-1} V_{i-1}, the other's P from shared memory  |  the rest of S
//   P_i = exp2(S - m_i), published    |  O += P_i V_i, P from registers
//
// so that the products of one warpgroup run beside the other's softmax. One thread of a third warpgroup fills the
// buffers, quarter by quarter as they are released, beyond the ends of requests. Two blocks of threads with the same
// keys and neighbouring query rows are a pair: each copies half of the keys for both.
//
// Bound by the power limit for many requests, by latency for few. H200, us end to end beside the limit max(bytes / 4.3
// TB/s, FLOP / 740 TFLOPS): batch 128, 128 heads, 4096 | 8192 keys: 258 (198) | 484 (397), two queries each 488 (397) |
// 941 (793); batch 64, 16384 keys, 16 | 64 heads 301 | 306 (281); one request of 65536 keys, 16 | 128 heads 32 (18) |
// 49 (25); 4 of 8192, 128 heads 34 (12); 2 of 8192, 16 heads 18 (4.4). 64 keys take 3200 cycles at 1.5 GHz and 692 of
// 700 W instead of the products' 2176. At 8192 keys 395 mJ go into a call, 356 with all keys in the L2; with keys of 0
// it takes 238 mJ and, at 1.98 GHz, less time by 17 %. The error against float64 is 0.98 to 1.002 of FlashMLA's on the
// same input; reference points that lag until a score exceeds them by 8 would make calls of pairs 2 to 5 % faster, and
// the error 1.01 to 1.03 of FlashMLA's. Of a short call 3 us are the launch, 1.5 the part, 0.6 the page and 2.5 the
// first keys; a piece of 64 rows takes 3 us to be stored, what the L2 takes in, and 16 rows 1; the combining kernel has
// the pieces 1 us after the last store and takes 1 to 6. In both, instructions that run once cost 10 to 25 cycles each.
// Smaller blocks of keys would not help: all multiprocessors together wait for the memory, then.
//
// A block of keys takes a call of few blocks 3900 cycles at 1.76 GHz, with or without a flush of the L2 before. From
// one block's weights to the next one's these are 2450 for products, 1664 if it were for the tensor cores alone:
// operands and arriving keys share the port of shared memory; 770 for the softmax; and 660 to publish 8 KB beside the
// other's scores, 400 without them. The next keys are there 1800 cycles after their quarter is released, of which 600
// pass until both blocks of a pair have released it.
//
// What did not help: none, one or three quarters of the scores before the other's weights instead of two (0 to 4 %
// slower), or all of them; scores in turn, after all of the other's; reference points published before the weights, to
// scale values meanwhile (3 % slower at batch 128); pieces as float16, each half of a row scaled by its largest value
// (0.5 to 2 us slower with 64 rows, 2 to 4 with 16: the instructions take longer than the bytes); short calls without
// pairs (-1 to +0.3 us; 2 to 5 % slower at batch 128); meeting the other block of a pair before results are stored
// instead of after (about 1 % slower at batch 128); asking the L2 for keys 1 to 3 blocks ahead; two warpgroups for
// scores and two for values (as fast); one for scores, two thirds of Q in its registers, two for values and a ring of
// 2.75 blocks (1 to 2 % faster at 128 heads, 1 to 3 % slower where memory bounds, 9 % for one request of 16 heads); one
// or two tiles of Q in registers; products of 256 columns, whose quarters are released together (4 % slower); weights
// published by halves; the other's products beside this one's softmax, after all scores (5 to 10 % slower: quarters are
// released late).

namespace dsm::dense_decode {

inline constexpr int kRows = 64;                ///< of a tile of queries, and keys of a block
inline constexpr int kTileBytes = 64 * 64 * 2;  ///< 64 columns of 64 rows
inline constexpr int kTiles = 9;                ///< of d_qk = 576
inline constexpr int kHalf = 4;                 ///< tiles of d_v of one warpgroup
inline constexpr int kQuarters = 4;             ///< of two tiles of d_v
inline constexpr int kWarpgroup = 128;          ///< threads
inline constexpr int kThreads = 3 * kWarpgroup;
inline constexpr int kQkColumns = 576, kVColumns = 512;
inline constexpr std::int64_t kMaxBatch = 4096;  ///< requests that finding the parts has room for

/// 64 columns of 64 rows, swizzled.
struct Tile {
  std::uint8_t bytes[kTileBytes];
};

/// Of a thread's two rows after a block: the reference points of the exponentials, base 2, and their sums in the
/// columns of this thread, whose counterpart in the other warpgroup goes on with them.
struct alignas(16) RowState {
  float m[2], l[2];
};

/// A block of keys that a part computes.
struct alignas(16) Block {
  static constexpr int kFirst = 1, kLast = 2;        ///< of what the part computes of the request
  static constexpr int kWhole = 4;                   ///< that is all of the request
  static constexpr int kNext = 8, kNextButOne = 16;  ///< the part has a block after this one, two blocks
  static constexpr int kOddPiece = 32;  ///< of an odd number of requests before this one the part computes something
  int request, keys, index, is;
};

struct Shared {
  Tile q[kTiles];
  Tile k[2][kTiles];  ///< the last tile is no value: when S is there, P takes its place
  RowState rows[2][kWarpgroup];
  Block blocks[4];  ///< what is in the buffers, and was in them before
  cuda::MBarrier q_full, q_empty;
  cuda::MBarrier k_full[2][kQuarters + 1];  ///< quarters of the values, the last tile
  cuda::MBarrier k_empty[2][kQuarters];     ///< the last tile goes with the last quarter of who reads P from it
};
static_assert(sizeof(Shared::q) >= split_kv::scratch_bytes(kMaxBatch));
/// The hardware has the buffer begin at a multiple of 16 bytes only.
inline constexpr std::size_t kSharedBytes = sizeof(Shared) + 1024;

struct Params {
  split_kv::Keys keys;
  split_kv::Workspace workspace;
  const std::int32_t* block_table;
  std::int64_t table_stride, table_size;
  std::int32_t page_blocks;  ///< blocks of a page
  std::int32_t rows, s_q, h_q;
  cuda::Divider heads;  ///< h_q
  bool causal;
  float scale;  ///< of the scores, for exponentials of base 2
  void* out;
  std::int64_t out_batch, out_position, out_head;  ///< strides
  float* lse;
};

/// For copies of a tile of queries, of two tiles of keys, and of the last tile of keys.
struct Maps {
  CUtensorMap q, k, k_last;
};

/// Goes through the blocks of a part.
class Blocks {
 public:
  __device__ Blocks(const split_kv::Keys& keys, const split_kv::Part& part)
      : keys_(keys), part_(part), request_(part.first_request - 1) {}
  __device__ Block next() {
    while (index_ == end_) next_request();
    Block block{request_, count_, index_, whole_ ? Block::kWhole : 0};
    if (index_ == begin_) block.is |= Block::kFirst, ++pieces_;
    if (pieces_ % 2 == 0) block.is |= Block::kOddPiece;
    if (++index_ == end_) block.is |= Block::kLast;
    if (++done_ < part_.blocks) block.is |= Block::kNext;
    if (done_ + 1 < part_.blocks) block.is |= Block::kNextButOne;
    return block;
  }

 private:
  __device__ void next_request() {
    ++request_;
    count_ = split_kv::key_count(keys_.keys, keys_.length, request_);
    const int blocks = (count_ + kRows - 1) / kRows;
    begin_ = index_ = request_ == part_.first_request ? part_.first_block : 0;
    end_ = request_ == part_.last_request ? part_.end_block : blocks;
    whole_ = begin_ == 0 && end_ == blocks;
  }

  const split_kv::Keys& keys_;
  const split_kv::Part& part_;
  int request_, count_ = 0, begin_ = 0, end_ = 0, index_ = 0, pieces_ = 0, done_ = 0;
  bool whole_ = false;
};

/// The work of the copying thread. The tiles of keys are copied by the blocks of a pair in turn, for both.
template <bool kPair>
class Copier {
 public:
  __device__ Copier(const Params& params, const Maps& maps, const split_kv::Part& part, int first_row, int rank,
                    Shared& shared)
      : params_(params),
        maps_(maps),
        shared_(shared),
        first_row_(first_row),
        rank_(rank),
        left_(part.blocks),
        blocks_(params.keys, part) {}

  /// Whether there is a block that was not copied.
  __device__ bool more() const { return left_ > 0; }
  /// Copies the next block of keys, as its quarters in the buffer are released; and the queries with a request's first.
  __device__ __forceinline__ void copy() {
    const Block block = blocks_.next();
    const int page = params_.block_table[block.request * params_.table_stride + block.index / params_.page_blocks];
    const int row = block.index % params_.page_blocks * kRows, buffer = n_ & 1;
    shared_.blocks[n_ & 3] = block;  // seen by who waits for a tile of it
    const auto copy_keys = [&](const CUtensorMap& map, int tile, int tiles, cuda::MBarrier& full) {
      full.arrive_expecting(tiles * kTileBytes);
      void* to = shared_.k[buffer][tile].bytes;
      if constexpr (!kPair)
        cuda::tensor_load(to, map, 0, row, tile, page, full, cuda::L2Hint::kEvictFirst);
      else if ((tile / 2 + n_) % 2 == rank_)
        cuda::tensor_multicast(to, map, 0, row, tile, page, full, 3, cuda::L2Hint::kEvictFirst);
    };
    const auto copy_half = [&](int half) {
      for (int quarter = 2 * half; quarter < 2 * half + 2; ++quarter) {
        if (n_ > 1) shared_.k_empty[buffer][quarter].wait(~(n_ >> 1) & 1);
        copy_keys(maps_.k, 2 * quarter, 2, shared_.k_full[buffer][quarter]);
      }
    };
    // In the order in which they are released and read.
    if (n_ == 0) copy_queries(block);
    copy_half(buffer);
    if (n_ > 0 && block.is & Block::kFirst) copy_queries(block);
    copy_half(1 - buffer);
    copy_keys(maps_.k_last, kTiles - 1, 1, shared_.k_full[buffer][kQuarters]);
    ++n_, --left_;
  }

 private:
  __device__ void copy_queries(const Block& block) {
    shared_.q_empty.wait(!(block.is & Block::kOddPiece));  // which the first piece passes at once
    shared_.q_full.arrive_expecting(kTiles * kTileBytes);
    cuda::tensor_load(shared_.q, maps_.q, 0, first_row_, 0, block.request, shared_.q_full, cuda::L2Hint::kEvictFirst);
  }

  const Params& params_;
  const Maps& maps_;
  Shared& shared_;
  const int first_row_, rank_;
  int n_ = 0, left_;
  Blocks blocks_;
};

/// Asks the L2 for the first 4 KB of the table, all of it for few requests, while the parts are found; by a warp.
__device__ __forceinline__ void ask_for_pages(const Params& params) {
  constexpr int kLine = 128 / sizeof(std::int32_t);
  const int at = threadIdx.x % cuda::kWarpSize * kLine;
  if (at < params.table_size) cuda::prefetch_l2(params.block_table + at);
}

/// Requests without keys: output 0 and lse +inf, by `threads` threads.
template <class T>
__device__ __forceinline__ void finish_empty(const Params& params, const split_kv::Part& part, int first_row,
                                             int thread, int threads) {
  for (int request = part.first_request; request <= part.last_request; ++request) {
    if (split_kv::key_count(params.keys.keys, params.keys.length, request) > 0) continue;
    for (int row = first_row; row < min(first_row + kRows, params.rows); ++row) {
      const int position = row / params.h_q, head = row % params.h_q;
      T* to = static_cast<T*>(params.out) + request * params.out_batch + position * params.out_position +
              head * params.out_head;
      for (int at = thread; at < kVColumns / 8; at += threads) reinterpret_cast<uint4*>(to)[at] = uint4{};
      if (thread == 0) params.lse[(std::int64_t{request} * params.h_q + head) * params.s_q + position] = INFINITY;
    }
  }
}

}  // namespace dsm::dense_decode
