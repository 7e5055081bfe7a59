// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Half a warp quantises a row at a time: it loads the first before it looks at the tokens' slots, and of elements of 16
// bits the next one before it works on one, as a row waits for memory longer than for its arithmetic. Rows of plain
// caches are copied by whole blocks. H200, 131072 rows, part of the same run's copy bandwidth, bfloat16 | float32:
// plain 92 | 97 %, V3.2 FP8 81 | 90 %, with float32 scales 73 | 88 %, V3.2 NVFP4 72 | 88 %. Quantising a row is about
// 190 warp instructions, to E2M1 250.
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
#include "src/kv_cache/warp_entries.cuh"

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

/// A lane's part of a row.
template <class Record, class T>
struct Part {
  static constexpr int kTailLanes = (Record::kWidth - Record::kQuantized) / kChunk;
  Chunk<T> chunks[kChunks], tail;

  __device__ __forceinline__ void load(const Rows<T>& latent, const Rows<T>& k_pe, std::int64_t token, int lane,
                                       bool aligned) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) chunks[k].load(latent[token] + RowLayout<Record>::column(lane, k), aligned);
    if (lane < kTailLanes) tail.load(k_pe[token] + lane * kChunk, aligned);
  }
};

/// kAligned: that rows and pages are, for 16-byte accesses.
template <class Record, KvScales kScales, class T, bool kAligned>
__global__ void __launch_bounds__(kRowThreads)
    mla_kv_insert_record_cuda_kernel(Placing placing, Rows<T> latent, Rows<T> k_pe, Pages cache, int rounds) {
  using Layout = RowLayout<Record>;
  constexpr bool kAhead = sizeof(T) == 2;  // that registers hold two rows
  const int warp = threadIdx.x / cuda::kWarpSize, half = threadIdx.x % cuda::kWarpSize / kRowLanes;
  const int lane = threadIdx.x % kRowLanes, of_block = kRowThreads / kRowLanes * rounds;
  const std::int64_t first = std::int64_t{blockIdx.x} * of_block + warp * 2 * rounds + half;
  const auto token = [&](int round) { return min(first + 2 * round, placing.tokens - 1); };
  Part<Record, T> part;
  part.load(latent, k_pe, token(0), lane, kAligned);
  const WarpEntries entries(placing, cache, warp * 2 * rounds, 2 * rounds, of_block, entry_at<Record>);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    Part<Record, T> next;
    if (kAhead && round + 1 < rounds) next.load(latent, k_pe, token(round + 1), lane, kAligned);
    if (!kAhead && round > 0) part.load(latent, k_pe, token(round), lane, kAligned);
    const KvEntry<std::uint8_t> entry = entries[2 * round + half];
    const bool stored = entry.data != nullptr;
#pragma unroll
    for (int k = 0; k < kChunks; k += Layout::kGroupChunks) {
      const float amax = largest_magnitude<Layout::kGroupLanes>(largest_bits<Layout::kGroupChunks>(part.chunks + k));
      if (stored)
        store_group<Record, Layout::kGroupChunks, kScales>(entry, Layout::column(lane, k), part.chunks + k, amax,
                                                           kAligned);
    }
    if (stored && lane < Part<Record, T>::kTailLanes)
      store_tail<Record>(entry.data, lane * kChunk, part.tail, kAligned);
    if (kAhead) part = next;
  }
}

constexpr int kPlainThreads = 256;
constexpr int kPlainTokens = 32;    // of a block; powers of two
constexpr int kFewPlainTokens = 4;  // where there are few tokens: more blocks share them
constexpr int kAtOnce = 3;          // packs of plain rows that a thread has in flight

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
    const int rounds = rounds_of(placing);
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
  const int of_block = placing.last_tokens ? kPlainTokens : kFewPlainTokens;
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
