// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Four lanes quantise a key of 128 values, as the models' are, which stays in their registers between the scale and the
// codes: about 45 warp instructions. Of longer ones the rest is read again, from the cache. H200, 524288 keys, part of
// the same run's copy bandwidth: bfloat16 64 to 74 %, float32 82 %. The marks of the last token of each slot take a
// tenth of the time: keys are small.
#include <cstdint>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/kv_cache/indexer_k_insert/indexer_k_insert.h"
#include "src/kv_cache/placing.cuh"
#include "src/kv_cache/quotient_codes.cuh"
#include "src/kv_cache/row_chunk.cuh"
#include "src/kv_cache/warp_entries.cuh"

namespace dsm {
namespace {

constexpr int kKeyLanes = 4;
constexpr int kRun = 2;                                   // chunks of a lane that are neighbours
constexpr int kKeysAtOnce = cuda::kWarpSize / kKeyLanes;  // of a warp
constexpr int kStep = kKeyLanes * kChunks * kChunk;       // values of a key that are held at the same time

/// kWhole: that d is kStep and that 16-byte accesses suit keys and pages.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads)
    indexer_k_insert_cuda_kernel(Placing placing, const T* k, std::int64_t stride, std::int64_t any_d, bool packed,
                                 Pages cache, bool aligned, int rounds) {
  constexpr bool kAhead = kWhole && sizeof(T) == 2;  // that registers hold two keys
  const std::int64_t d = kWhole ? kStep : any_d;
  const int warp = threadIdx.x / cuda::kWarpSize, of_warp = threadIdx.x % cuda::kWarpSize / kKeyLanes;
  const int lane = threadIdx.x % kKeyLanes, of_block = kRowThreads / kKeyLanes * rounds;
  const int count = kKeysAtOnce * rounds;  // of a warp's tokens
  const std::int64_t first = std::int64_t{blockIdx.x} * of_block + warp * count + of_warp;
  const auto column = [&](std::int64_t begin, int c) {
    return begin + (c / kRun * kKeyLanes * kRun + lane * kRun + c % kRun) * kChunk;
  };
  // Zeros behind the end, which change no magnitude.
  const auto load = [&](int round, std::int64_t begin, Chunk<T>(&chunks)[kChunks]) {
    const T* key = k + min(first + kKeysAtOnce * round, placing.tokens - 1) * stride;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const std::int64_t at = column(begin, c);
      if (kWhole || at + kChunk <= d) {
        chunks[c].load(key + at, kWhole || packed);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) chunks[c].at[i] = at + i < d ? key[at + i] : T{};
      }
    }
  };
  Chunk<T> chunks[kChunks];
  load(0, 0, chunks);
  const WarpEntries entries(placing, cache, warp * count, count, of_block, [&](const Pages::Place& place) {
    return indexer_entry(place.page, place.page_size, d, place.entry);
  });
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    Chunk<T> next[kChunks];
    if (kAhead && round + 1 < rounds) load(round + 1, 0, next);
    if (!kAhead && round > 0) load(round, 0, chunks);
    std::int32_t bits = largest_bits<kChunks>(chunks);
    for (std::int64_t begin = kStep; begin < d; begin += kStep) {
      load(round, begin, chunks);
      bits = max(bits, largest_bits<kChunks>(chunks));
    }
    const float8_e8m0fnu scale = e4m3_block_scale(largest_magnitude<kKeyLanes>(bits));
    const ByPowerOfTwo by(scale);
    const KvEntry<std::uint8_t> entry = entries[kKeysAtOnce * round + of_warp];
    const bool stored = entry.data != nullptr;
    if (stored && lane == 0) {
      if (kWhole)
        *reinterpret_cast<float*>(entry.scales) = to_float(scale);
      else
        store_unaligned(entry.scales, to_float(scale));
    }
    if constexpr (kWhole) {
#pragma unroll
      for (int c = 0; c < kChunks; c += kRun)
        if (stored) store_e4m3<kRun>(chunks + c, by, is_nan(scale), entry.data + column(0, c), true);
    } else {
      for (std::int64_t begin = 0; begin < d; begin += kStep) {
        if (d > kStep) load(round, begin, chunks);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const std::int64_t at = column(begin, c);
          if (!stored || at >= d) continue;
          if (at + kChunk <= d) {
            store_e4m3<1>(chunks + c, by, is_nan(scale), entry.data + at, aligned);
          } else {
            std::uint8_t codes[kChunk];
            store_e4m3<1>(chunks + c, by, is_nan(scale), codes, false);
#pragma unroll
            for (int i = 0; i < kChunk; ++i)
              if (at + i < d) entry.data[at + i] = codes[i];
          }
        }
      }
    }
    if constexpr (kAhead) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) chunks[c] = next[c];
    }
  }
}

}  // namespace

void indexer_k_insert_cuda(const IndexerKInsertArgs& a, const Launch& launch) {
  const std::int64_t d = a.k.size(1);
  const bool packed = cuda::packable({a.k}), aligned = Pages::aligned(a.cache) && d % kChunk == 0;
  cpu::visit_floating(a.k.dtype, [&]<class T>() {
    const Placing placing("indexer_k_insert", a.slots, a.cache, launch);
    const int rounds = rounds_of(placing);
    launch_placing("indexer_k_insert", placing,
                   packed && aligned && d == kStep ? indexer_k_insert_cuda_kernel<T, true>
                                                   : indexer_k_insert_cuda_kernel<T, false>,
                   dim3(cuda::ceil_div<std::int64_t>(placing.tokens, kRowThreads / kKeyLanes * rounds)),
                   dim3(kRowThreads), launch, a.k.as<const T>(), a.k.stride[0], d, packed, Pages(a.cache), aligned,
                   rounds);
  });
}

}  // namespace dsm
