// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Half a warp quantises a row, all of which it loads before it looks at the token's slot; a warp copies a row into a
// plain cache. H200, 131072 rows, part of the same run's copy bandwidth, bfloat16 | float32: plain 53 | 101 %, V3.2 FP8
// 52 | 77 %, V3.2 NVFP4 33 | 60 %: with 16-bit elements too few bytes are in flight, in NVFP4 instructions are next.
#include <algorithm>
#include <cstdint>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/kv_cache/mla_kv_insert/mla_kv_insert.h"
#include "src/kv_cache/placing.cuh"
#include "src/kv_cache/quantized_row.cuh"

namespace dsm {
namespace {

using cuda::Pack;

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;  // packs of a plain row that a thread has in flight

/// [tokens, columns] with adjacent columns.
template <class T>
struct Rows {
  const T* data;
  std::int64_t stride, columns;

  explicit Rows(const TensorView& view) : data(view.as<const T>()), stride(view.stride[0]), columns(view.size(1)) {}
  __device__ const T* operator[](std::int64_t token) const { return data + token * stride; }
};

template <class Record, class T>
__global__ void __launch_bounds__(kThreads)
    mla_kv_insert_record_cuda_kernel(Rows<T> latent, Rows<T> k_pe, bool packed, Placing placing, KvScales scales,
                                     Pages cache, bool aligned) {
  constexpr int kTokens = kThreads / kRowLanes, kChunks = Record::kQuantized / kChunk / kRowLanes;
  const int lane = threadIdx.x % kRowLanes, of_block = threadIdx.x / kRowLanes;
  const std::int64_t token = min(std::int64_t{blockIdx.x} * kTokens + of_block, placing.tokens - 1);
  const bool has_tail = lane < (Record::kWidth - Record::kQuantized) / kChunk;
  Chunk<T> chunks[kChunks], tail{};
#pragma unroll
  for (int k = 0; k < kChunks; ++k) chunks[k].load(latent[token] + (lane + k * kRowLanes) * kChunk, packed);
  if (has_tail) tail.load(k_pe[token] + lane * kChunk, packed);

  const std::int64_t slot = placing.slot_of<kTokens>(of_block, cache);
  const bool stored = slot >= 0;
  const Pages::Place place = cache[stored ? slot : 0];
  const auto entry = kv_entry<Record>(place.page, place.page_size, place.entry);
  float x[kChunk];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    chunks[k].values(x);
    const float amax = largest_magnitude<Record::kGroup / kChunk>(x);
    if (stored) store_codes<Record>(entry, (lane + k * kRowLanes) * kChunk, x, amax, scales, aligned);
  }
  tail.values(x);
  if (stored && has_tail) store_tail<Record>(entry.data, lane * kChunk, x, aligned);
}

/// Rows of T's for a cache of C's, W at a time.
template <class T, class C, int W>
__global__ void __launch_bounds__(kThreads)
    mla_kv_insert_plain_cuda_kernel(Rows<T> latent, Rows<T> k_pe, Placing placing, Pages cache) {
  constexpr int kTokens = kThreads / cuda::kWarpSize, kStep = cuda::kWarpSize * W;
  const int lane = threadIdx.x % cuda::kWarpSize, of_block = threadIdx.x / cuda::kWarpSize;
  const std::int64_t slot = placing.slot_of<kTokens>(of_block, cache);
  if (slot < 0) return;
  const std::int64_t token = std::int64_t{blockIdx.x} * kTokens + of_block, width = latent.columns + k_pe.columns;
  const Pages::Place place = cache[slot];
  C* to = reinterpret_cast<C*>(place.page) + place.entry * width;
  for (std::int64_t begin = lane * W; begin < width; begin += kAtOnce * kStep) {
    Pack<T, W> packs[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const std::int64_t column = begin + j * kStep;
      if (column >= width) break;
      packs[j] = cuda::load_pack<W>(column < latent.columns ? latent[token] + column
                                                            : k_pe[token] + (column - latent.columns));
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (begin + j * kStep >= width) break;
      cuda::use_from_here(packs[j]);
      Pack<C, W> result;
#pragma unroll
      for (int i = 0; i < W; ++i)  // through float, if from double to 16 bits
        result.at[i] = narrow<C>(static_cast<Compute<C>>(cuda::widened(packs[j].at[i])));
      cuda::store_pack(to + begin + j * kStep, result);
    }
  }
}

template <class T>
void insert_records(const MlaKvInsertArgs& a, KvFormat format, const Launch& launch) {
  const auto insert = [&]<class Record>() {
    cuda::launch("mla_kv_insert", mla_kv_insert_record_cuda_kernel<Record, T>,
                 dim3(cuda::ceil_div<std::int64_t>(a.slots.numel(), kThreads / kRowLanes)), dim3(kThreads), 0, launch,
                 Rows<T>(a.latent), Rows<T>(a.k_pe), cuda::packable({a.latent, a.k_pe}),
                 Placing("mla_kv_insert", a.slots, a.cache, launch), a.scales, Pages(a.cache), Pages::aligned(a.cache));
  };
  format == KvFormat::v32_fp8 ? insert.template operator()<KvV32Fp8>() : insert.template operator()<KvV32Nvfp4>();
}

template <class T, class C, int W>
void insert_plain(const MlaKvInsertArgs& a, const Launch& launch) {
  cuda::launch("mla_kv_insert", mla_kv_insert_plain_cuda_kernel<T, C, W>,
               dim3(cuda::ceil_div<std::int64_t>(a.slots.numel(), kThreads / cuda::kWarpSize)), dim3(kThreads), 0,
               launch, Rows<T>(a.latent), Rows<T>(a.k_pe), Placing("mla_kv_insert", a.slots, a.cache, launch),
               Pages(a.cache));
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
