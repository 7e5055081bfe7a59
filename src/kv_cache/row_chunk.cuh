// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "src/cuda/copy/pack.cuh"
#include "src/cuda/reduce/warp.cuh"
#include "src/numerics/float_format.h"

// Neighbours of a row that is quantised, as a thread holds them.

namespace dsm {

inline constexpr int kChunk = 8;   // neighbours that are converted together
inline constexpr int kChunks = 4;  // of a thread

/// x in float32. NaN keeps its sign, which shows in the codes.
template <class T>
__device__ __forceinline__ float in_float(T x) {
  if constexpr (std::is_same_v<T, float16>)
    return copysignf(cuda::widened(x), __uint_as_float(std::uint32_t{x.bits} << 16));
  else if constexpr (std::is_same_v<T, double>)
    return copysignf(static_cast<float>(x), __int_as_float(__double2hiint(x)));
  else
    return cuda::widened(x);
}

/// A chunk in its storage type, moved by 16-byte accesses where `packed`.
template <class T>
struct alignas(16) Chunk {
  T at[kChunk];

  __device__ __forceinline__ void load(const T* from, bool packed) {
    constexpr int kPack = cuda::kPackSize<T>;
    if (packed) {
#pragma unroll
      for (int part = 0; part < kChunk; part += kPack) {
        const auto pack = cuda::load_pack<kPack>(from + part);
#pragma unroll
        for (int i = 0; i < kPack; ++i) at[part + i] = pack.at[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) at[i] = from[i];
    }
  }
  __device__ __forceinline__ void store_packed(T* to) const {
    constexpr int kPack = cuda::kPackSize<T>;
#pragma unroll
    for (int part = 0; part < kChunk; part += kPack) {
      cuda::Pack<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.at[i] = at[part + i];
      cuda::store_pack(to + part, pack);
    }
  }
  /// Two neighbours of 16 bits.
  __device__ __forceinline__ std::uint32_t word(int i) const { return reinterpret_cast<const std::uint32_t*>(at)[i]; }
  __device__ __forceinline__ auto pair(int i) const {
    using Pair = std::conditional_t<std::is_same_v<T, bfloat16>, __nv_bfloat162, __half2>;
    static_assert(sizeof(T) == sizeof(Pair) / 2);
    return reinterpret_cast<const Pair*>(at)[i];
  }
  /// The values in float32, in which quantised caches take them.
  __device__ __forceinline__ void values(float* to) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
#pragma unroll
      for (int i = 0; i < kChunk; i += 2) {
        to[i] = __uint_as_float(word(i / 2) << 16);
        to[i + 1] = __uint_as_float(word(i / 2) & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) to[i] = in_float(at[i]);
    }
  }
};

/// The largest magnitude of some chunks, in float32, as bits; of NaN, if there is one: they are larger than those of
/// every number.
template <int kCount, class T>
__device__ __forceinline__ std::int32_t largest_bits(const Chunk<T>* chunks) {
  if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>) {
    auto largest = __habs2(chunks[0].pair(0));
#pragma unroll
    for (int i = 1; i < kCount * kChunk / 2; ++i)
      largest = __hmax2_nan(largest, __habs2(chunks[i / (kChunk / 2)].pair(i % (kChunk / 2))));
    const auto both = reinterpret_cast<const std::uint32_t&>(largest);
    const T larger{static_cast<std::uint16_t>(max(both >> 16, both & 0xffffu))};
    return static_cast<std::int32_t>(bits_of(in_float(larger)));
  } else {
    std::int32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount * kChunk; ++i)
      bits = max(bits, static_cast<std::int32_t>(bits_of(in_float(chunks[i / kChunk].at[i % kChunk])) & 0x7fffffff));
    return bits;
  }
}

/// The largest of `kLanes` neighbouring lanes; all lanes of the warp must call it.
template <int kLanes>
__device__ __forceinline__ float largest_magnitude(std::int32_t bits) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    bits = max(bits, __shfl_xor_sync(cuda::kAllLanes, bits, distance));
  return __int_as_float(bits);
}

}  // namespace dsm
