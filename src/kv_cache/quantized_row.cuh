// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include "dsm/kv_cache.h"
#include "src/cuda/copy/codes.cuh"
#include "src/kv_cache/quotient_codes.cuh"
#include "src/kv_cache/row_chunk.cuh"
#include "src/numerics/kv_record.h"

// A row of 512 values that is quantised lies over half a warp, a lane of which holds two runs of 16 neighbours: the
// groups of an E2M1 row, and 16 bytes of an E4M3 row. The bytes are those of the CPU.

namespace dsm {

inline constexpr int kRowLanes = 16;
inline constexpr int kHalves = 2;  // of a warp

/// How the groups of a record lie over lanes.
template <class Record>
struct RowLayout {
  static constexpr int kRun = 2;                           // chunks of a lane that are neighbours
  static constexpr int kGroupChunks = kRun;                // of a lane
  static constexpr int kGroupLanes = Record::kGroup / 16;  // which are neighbours

  /// Where a lane's chunk begins.
  static __device__ __forceinline__ int column(int lane, int chunk) {
    return (chunk / kRun * kRowLanes * kRun + lane * kRun + chunk % kRun) * kChunk;
  }
};

/// Stores one chunk of a record's values that have no scale; `column` counts from the first of them.
template <class Record, class T>
__device__ __forceinline__ void store_tail(std::uint8_t* data, int column, const Chunk<T>& chunk, bool aligned) {
  using Tail = typename Record::Tail;
  std::uint8_t* to = data + Record::kTailAt + column * static_cast<int>(sizeof(Tail));
  cuda::Pack<Tail, kChunk> pack;
  float x[kChunk];
  chunk.values(x);
  if (largest_bits<1>(&chunk) > 0x7f800000) {  // the device's instructions make other NaN of NaN
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (std::is_same_v<Tail, bfloat16>)
        pack.at[i] = to_bfloat16(x[i]);
      else
        pack.at[i] = to_e4m3_saturating(x[i]);
    }
  } else if constexpr (std::is_same_v<Tail, T>) {
    pack = __builtin_bit_cast(cuda::Pack<Tail, kChunk>, chunk);
  } else if constexpr (std::is_same_v<Tail, bfloat16>) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) pack.at[i] = cuda::narrowed<bfloat16>(x[i]);
  } else {
    pack = __builtin_bit_cast(cuda::Pack<Tail, kChunk>, cuda::e4m3_codes(x));
  }
  cuda::store_bytes(to, __builtin_bit_cast(cuda::Bytes<kChunk * sizeof(Tail)>, pack), aligned);
}

/// Stores a group's values in the chunks of one lane, neighbours from `column` on; amax is the group's largest
/// magnitude. The lane that begins the group stores the scale.
template <class Record, int kCount, KvScales kScales, class T>
__device__ __forceinline__ void store_group(KvEntry<std::uint8_t> entry, int column, const Chunk<T>* chunks, float amax,
                                            bool aligned) {
  using Scale = typename Record::Scale;
  const auto store_scale = [&](Scale scale) {
    std::uint8_t* to = entry.scales + column / Record::kGroup * static_cast<int>(sizeof(Scale));
    if (column % Record::kGroup != 0) return;
    if (aligned)
      *reinterpret_cast<Scale*>(to) = scale;
    else
      store_unaligned(to, scale);
  };
  if constexpr (std::is_same_v<typename Record::Element, float4_e2m1>) {
    const Scale scale = e2m1_scale(amax, Record::kScaleOfZeros);
    store_scale(scale);
    float factors[2];
    cuda::widen_e4m3(cuda::Bytes<2>{{scale.bits, 0}}, factors);
    const float factor = factors[0];
    struct alignas(4 * kCount) {
      std::uint32_t at[kCount];
    } codes;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (factor == factor) {
        codes.at[c] = e2m1_codes_of_quotients(chunks[c], factor, amax);
      } else {
        float x[kChunk];
        chunks[c].values(x);
        codes.at[c] = __builtin_bit_cast(std::uint32_t, cuda::e2m1_codes(x));
      }
    }
    cuda::store_bytes(entry.data + column / 2, __builtin_bit_cast(cuda::Bytes<4 * kCount>, codes), aligned);
  } else {
    const auto store_codes = [&](const auto& by, bool scale_is_nan) {
      store_e4m3<kCount>(chunks, by, scale_is_nan, entry.data + column, aligned);
    };
    if constexpr (kScales == KvScales::fp32) {
      const float scale = e4m3_block_scale_float(amax);
      store_scale(scale);
      store_codes(ByNumber<T>(scale), scale != scale);
    } else {
      const float8_e8m0fnu scale = e4m3_block_scale(amax);
      if constexpr (std::is_same_v<Scale, float>)
        store_scale(to_float(scale));
      else
        store_scale(scale);
      store_codes(ByPowerOfTwo(scale), is_nan(scale));
    }
  }
}

}  // namespace dsm
