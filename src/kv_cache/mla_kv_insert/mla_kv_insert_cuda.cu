// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Half a warp quantises a row at a time. Few rows are loaded before it looks at the tokens' slots. Of many only those
// with a slot are read, and those of 16-bit elements come by bulk copies some rounds ahead where a device has them
// (row_ring.cuh), as a row waits for memory longer than for its arithmetic. Rows of plain caches are copied by whole
// blocks. H200, 131072 rows, every seventh without a slot, part of the same run's copy bandwidth, bfloat16 | float32:
// plain 91 | 97 %, V3.2 FP8 83 | 98 %, with float32 scales 81 | 92 %, V3.2 NVFP4 83 | 90 %. Quantising a row is about
// 175 warp instructions, to E2M1 255.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/launch/launch.h"
#include "src/kv_cache/mla_kv_insert/mla_kv_insert.h"
#include "src/kv_cache/placing.cuh"
#include "src/kv_cache/quantized_row.cuh"
#include "src/kv_cache/row_ring.cuh"
#include "src/kv_cache/warp_rows.cuh"

namespace dsm {
namespace {

using cuda::Pack;

/// [tokens, columns] with adjacent columns.
template <class T>
struct Rows {
  const T* data;
  std::int64_t stride, columns;

  explicit Rows(const TensorView& view) : data(view.as<const T>()), stride(view.stride[0]), columns(view.size(1)) {}
  __device__ const T* operator[](std::int64_t token) const { return data + token * stride; }
};

/// kAligned: that rows and pages are, for 16-byte accesses.
template <class Record, KvScales kScales, class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads)
    mla_kv_insert_record_cuda_kernel(Placing placing, Rows<T> latent, Rows<T> k_pe, Pages cache, int rounds) {
  using Layout = RowLayout<Record>;
  constexpr bool kAhead = kBulkCopies && kAligned && sizeof(T) == 2;  // wider rows come fast enough without
  constexpr int kLatentBytes = Record::kQuantized * sizeof(T), kRowBytes = Record::kWidth * sizeof(T);
  constexpr int kTailLanes = (Record::kWidth - Record::kQuantized) / kChunk;
  using Ring = std::conditional_t<kAhead, RowRing<kHalves, kRowBytes>, NoRing>;
  __shared__ typename Ring::Shared shared;
  const int half = threadIdx.x % cuda::kWarpSize / kRowLanes, lane = threadIdx.x % kRowLanes;
  const bool ahead = kAhead && rounds > 1;
  WarpRows rows(placing, cache, kHalves * rounds, rounds > 1);
  Ring ring(shared);
  const auto fetch = [&](int round) {
    ring.fetch(round, rows, [&](std::int64_t token, std::uint32_t to, auto& landed) {
      cuda::bulk_load(to, latent[token], kLatentBytes, landed);
      cuda::bulk_load(to + kLatentBytes, k_pe[token], kRowBytes - kLatentBytes, landed);
    });
  };
  Chunk<T> chunks[kChunks], tail;
  const auto load_from = [&](const T* row, const T* tail_row) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) chunks[k].load(row + Layout::column(lane, k), kAligned);
    if (lane < kTailLanes) tail.load(tail_row + lane * kChunk, kAligned);
  };
  const auto load = [&](int round) {
    const std::int64_t token = rows.token(kHalves * round + half);
    load_from(latent[token], k_pe[token]);
  };
  if (ahead)
    ring.begin(fetch);
  else if (rows.size() > 0)
    load(0);
  rows.place(placing, cache, kHalves * rounds, entry_at<Record>);
#pragma unroll 1
  for (int round = 0; kHalves * round < rows.size(); ++round) {
    if (ahead) {
      ring.await(round);
      const T* row = ring.template row<T>(round, half);
      load_from(row, row + Record::kQuantized);
    } else if (round > 0) {
      load(round);
    }
    const KvEntry<std::uint8_t> entry = rows.entry(kHalves * round + half);
    const bool stored = entry.data != nullptr;
#pragma unroll
    for (int k = 0; k < kChunks; k += Layout::kGroupChunks) {
      const float amax = largest_magnitude<Layout::kGroupLanes>(largest_bits<Layout::kGroupChunks>(chunks + k));
      if (stored)
        store_group<Record, Layout::kGroupChunks, kScales>(entry, Layout::column(lane, k), chunks + k, amax, kAligned);
    }
    if (stored && lane < kTailLanes) store_tail<Record>(entry.data, lane * kChunk, tail, kAligned);
    if (ahead) {
      __syncwarp();
      fetch(round + Ring::kStages);
    }
  }
}

constexpr int kPlainThreads = 256;
constexpr int kPlainTokens = 32;    // of a block; powers of two
constexpr int kFewPlainTokens = 4;  // where there are few, up to
constexpr int kFewTokens = 2048;
constexpr int kAtOnce = 3;  // packs of plain rows that a thread has in flight

struct PackPlace {
  std::uint32_t token;  // of the block
  std::int64_t column;
};

/// Rows of T's for a cache of C's, W elements at a time; consecutive threads copy consecutive packs.
template <class T, class C, int W>
__global__ void __launch_bounds__(kPlainThreads, 4)
    mla_kv_insert_plain_cuda_kernel(Placing placing, Rows<T> latent, Rows<T> k_pe, Pages cache,
                                    cuda::Divider packs_of_row, int of_block) {
  __shared__ std::int64_t slots[kPlainTokens];
  const std::int64_t first = std::int64_t{blockIdx.x} * of_block, width = latent.columns + k_pe.columns;
  const auto tokens = static_cast<std::uint32_t>(min(std::int64_t{of_block}, placing.tokens - first));
  const std::uint32_t count = tokens * packs_of_row.divisor();
  const auto place_of = [&](std::uint32_t item) {
    const std::uint32_t token = packs_of_row.quotient(item);
    return PackPlace{token, std::int64_t{item - token * packs_of_row.divisor()} * W};
  };
  for (std::uint32_t begin = threadIdx.x; begin < count + threadIdx.x; begin += kAtOnce * kPlainThreads) {
    Pack<T, W> packs[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {  // behind the end the last pack again, in vain
      const auto [token, column] = place_of(min(begin + j * kPlainThreads, count - 1));
      packs[j] = cuda::load_pack<W>(column < latent.columns ? latent[first + token] + column
                                                            : k_pe[first + token] + (column - latent.columns));
    }
    if (begin == threadIdx.x) {  // the first time, in all threads
      const std::int64_t slot = placing.slot_of(threadIdx.x & (of_block - 1), of_block, cache);
      if (threadIdx.x < of_block) slots[threadIdx.x] = slot;
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (begin + j * kPlainThreads >= count) continue;
      const auto [token, column] = place_of(begin + j * kPlainThreads);
      if (slots[token] < 0) continue;
      const Pages::Place place = cache[slots[token]];
      C* to = reinterpret_cast<C*>(place.page) + place.entry * width + column;
      cuda::use_from_here(packs[j]);
      if constexpr (std::is_same_v<T, C>) {
        cuda::store_pack(to, packs[j]);
      } else {
        Pack<C, W> result;
#pragma unroll
        for (int i = 0; i < W; ++i)  // through float, if from double to 16 bits
          result.at[i] = narrow<C>(static_cast<Compute<C>>(cuda::widened(packs[j].at[i])));
        cuda::store_pack(to, result);
      }
    }
  }
}

template <class T>
void insert_records(const MlaKvInsertArgs& a, KvFormat format, const Launch& launch) {
  const bool aligned = cuda::packable({a.latent, a.k_pe}) && Pages::aligned(a.cache);
  const auto insert = [&]<class Record, KvScales kScales>() {
    const Placing placing("mla_kv_insert", a.slots, a.cache, launch);
    const int rounds = rounds_of(placing, kHalves, sizeof(T) == 2 ? 16 : 4);
    launch_placing("mla_kv_insert", placing,
                   aligned ? mla_kv_insert_record_cuda_kernel<Record, kScales, T, true>
                           : mla_kv_insert_record_cuda_kernel<Record, kScales, T, false>,
                   dim3(cuda::ceil_div<std::int64_t>(placing.tokens, kRowThreads / kRowLanes * rounds)),
                   dim3(kRowThreads), launch, Rows<T>(a.latent), Rows<T>(a.k_pe), Pages(a.cache), rounds);
  };
  if (format != KvFormat::v32_fp8)
    insert.template operator()<KvV32Nvfp4, KvScales::ue8m0>();
  else if (a.scales == KvScales::fp32)
    insert.template operator()<KvV32Fp8, KvScales::fp32>();
  else
    insert.template operator()<KvV32Fp8, KvScales::ue8m0>();
}

template <class T, class C, int W>
void insert_plain(const MlaKvInsertArgs& a, const Launch& launch) {
  const auto packs_of_row = static_cast<std::uint32_t>((a.latent.size(1) + a.k_pe.size(1)) / W);
  if (packs_of_row == 0) return;
  const Placing placing("mla_kv_insert", a.slots, a.cache, launch);
  const int of_block = placing.tokens > kFewTokens ? kPlainTokens : kFewPlainTokens;
  launch_placing("mla_kv_insert", placing, mla_kv_insert_plain_cuda_kernel<T, C, W>,
                 dim3(cuda::ceil_div<std::int64_t>(placing.tokens, of_block)), dim3(kPlainThreads), launch,
                 Rows<T>(a.latent), Rows<T>(a.k_pe), Pages(a.cache), cuda::Divider(packs_of_row), of_block);
}

}  // namespace

void mla_kv_insert_cuda(const MlaKvInsertArgs& a, const Launch& launch) {
  cpu::visit_floating(a.latent.dtype, [&]<class T>() {
    if (const auto format = kv_format(a.cache)) return insert_records<T>(a, *format, launch);
    cpu::visit_floating(a.cache.dtype, [&]<class C>() {
      constexpr int W = std::min(cuda::kPackSize<T>, cuda::kPackSize<C>);
      const bool packs = Pages::aligned(a.cache) && cuda::packable({a.latent, a.k_pe}) && a.latent.size(1) % W == 0 &&
                         a.k_pe.size(1) % W == 0;
      packs ? insert_plain<T, C, W>(a, launch) : insert_plain<T, C, 1>(a, launch);
    });
  });
}

}  // namespace dsm
