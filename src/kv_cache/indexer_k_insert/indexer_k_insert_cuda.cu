// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Four lanes quantise a key of 128 values, as the models' are, which stays in their registers between the scale and the
// codes. Of longer ones the rest is read again, from the cache. H200, 524288 keys, every seventh without a slot, part
// of the same run's copy bandwidth: bfloat16 80 %, float32 90 %; in turns with torch's composition, in dsm
// bench, 68 %. The marks of the last token of each slot take a tenth of the time: keys are small.
#include <cstdint>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/kv_cache/indexer_k_insert/indexer_k_insert.h"
#include "src/kv_cache/placing.cuh"
#include "src/kv_cache/quotient_codes.cuh"
#include "src/kv_cache/row_chunk.cuh"
#include "src/kv_cache/warp_rows.cuh"

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
  const std::int64_t d = kWhole ? kStep : any_d;
  const int of_warp = threadIdx.x % cuda::kWarpSize / kKeyLanes, lane = threadIdx.x % kKeyLanes;
  const auto column = [&](std::int64_t begin, int c) {
    return begin + (c / kRun * kKeyLanes * kRun + lane * kRun + c % kRun) * kChunk;
  };
  WarpRows rows(placing, cache, kKeysAtOnce * rounds, rounds > 1);
  Chunk<T> chunks[kChunks];
  // Zeros behind the end, which change no magnitude.
  const auto load = [&](int round, std::int64_t begin) {
    const T* key = k + rows.token(kKeysAtOnce * round + of_warp) * stride;
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
  if (rows.size() > 0) load(0, 0);
  rows.place(placing, cache, kKeysAtOnce * rounds,
             [&](const Pages::Place& place) { return indexer_entry(place.page, place.page_size, d, place.entry); });
#pragma unroll 1
  for (int round = 0; kKeysAtOnce * round < rows.size(); ++round) {
    if (round > 0) load(round, 0);
    std::int32_t bits = largest_bits<kChunks>(chunks);
    for (std::int64_t begin = kStep; begin < d; begin += kStep) {
      load(round, begin);
      bits = max(bits, largest_bits<kChunks>(chunks));
    }
    const float8_e8m0fnu scale = e4m3_block_scale(largest_magnitude<kKeyLanes>(bits));
    const ByPowerOfTwo by(scale);
    const KvEntry<std::uint8_t> entry = rows.entry(kKeysAtOnce * round + of_warp);
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
        if (d > kStep) load(round, begin);
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
  }
}

}  // namespace

void indexer_k_insert_cuda(const IndexerKInsertArgs& a, const Launch& launch) {
  const std::int64_t d = a.k.size(1);
  const bool packed = cuda::packable({a.k}), aligned = Pages::aligned(a.cache) && d % kChunk == 0;
  cpu::visit_floating(a.k.dtype, [&]<class T>() {
    const Placing placing("indexer_k_insert", a.slots, a.cache, launch);
    const int rounds = rounds_of(placing, kKeysAtOnce, 4);
    launch_placing("indexer_k_insert", placing,
                   packed && aligned && d == kStep ? indexer_k_insert_cuda_kernel<T, true>
                                                   : indexer_k_insert_cuda_kernel<T, false>,
                   dim3(cuda::ceil_div<std::int64_t>(placing.tokens, kRowThreads / kKeyLanes * rounds)),
                   dim3(kRowThreads), launch, a.k.as<const T>(), a.k.stride[0], d, packed, Pages(a.cache), aligned,
                   rounds);
  });
}

}  // namespace dsm
