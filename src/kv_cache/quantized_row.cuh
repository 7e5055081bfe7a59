// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dsm/kv_cache.h"
#include "src/cuda/copy/codes.cuh"
#include "src/cuda/reduce/warp.cuh"
#include "src/numerics/kv_record.h"

// A row that is quantised lies over half a warp: of its chunks of 8 neighbouring values a lane holds those of its own
// number, of that + 16, and so on. The bytes are those of the CPU.

namespace dsm {

inline constexpr int kRowLanes = 16;
inline constexpr int kChunk = 8;

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
  /// The values in float32, in which quantised caches take them.
  __device__ __forceinline__ void values(float (&to)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = in_float(at[i]);
  }
};

/// The largest magnitude of the chunks of `kLanes` neighbouring lanes; all lanes of the warp must call it. NaN if there
/// is one: it has larger bits than every number.
template <int kLanes>
__device__ __forceinline__ float largest_magnitude(const float (&x)[kChunk]) {
  std::int32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) bits = max(bits, static_cast<std::int32_t>(bits_of(x[i]) & 0x7fffffff));
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    bits = max(bits, __shfl_xor_sync(cuda::kAllLanes, bits, distance));
  return __int_as_float(bits);
}

// What makes a chunk's values quotients by the scale; 1 stands in for a scale that is NaN.

class ByPowerOfTwo {
 public:
  __device__ explicit ByPowerOfTwo(float8_e8m0fnu scale)
      : reciprocal_(scale.bits == 255 ? 1.0f : to_float(float8_e8m0fnu{static_cast<std::uint8_t>(254 - scale.bits)})) {}
  __device__ __forceinline__ void divide(float (&x)[kChunk]) const {
#pragma unroll
    for (float& value : x) value *= reciprocal_;
  }

 private:
  float reciprocal_;
};

/// A call: it is rare, and long.
static __device__ __noinline__ float any_quotient(float x, float divisor) { return x / divisor; }

/// Division by a positive number, rounded as the processor's own: the quotient by the reciprocal, twice improved by
/// what it leaves, which a fused product shows exactly (Markstein 1990). Too small a divisor could make that underflow;
/// then the processor divides.
class ByNumber {
 public:
  __device__ explicit ByNumber(float scale)
      : divisor_(scale == scale ? scale : 1.0f), reciprocal_(1.0f / divisor_), near_(scale >= 0x1p-64f) {}
  __device__ __forceinline__ void divide(float (&x)[kChunk]) const {
    if (near_) {
#pragma unroll
      for (float& value : x) {
        float quotient = value * reciprocal_;
        quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, value), reciprocal_, quotient);
        quotient = __fmaf_rn(__fmaf_rn(-quotient, divisor_, value), reciprocal_, quotient);
        value = copysignf(quotient, value);  // for zero
      }
    } else {
#pragma unroll
      for (float& value : x) value = any_quotient(value, divisor_);
    }
  }

 private:
  float divisor_, reciprocal_;
  bool near_;
};

/// Stores the E4M3 codes of the quotients.
template <class By>
__device__ __forceinline__ void store_e4m3(float (&x)[kChunk], const By& by, bool scale_is_nan, std::uint8_t* to,
                                           bool aligned) {
  std::uint32_t signs = 0;  // NaN keeps its sign, which the conversion forgets
  if (scale_is_nan) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) signs |= bits_of(x[i]) >> 31 << i;
  }
  by.divide(x);
  cuda::Bytes<kChunk> codes = cuda::e4m3_codes(x);
  if (scale_is_nan) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) codes.at[i] |= (signs >> i & 1) << 7;
  }
  cuda::store_bytes(to, codes, aligned);
}

__device__ __forceinline__ bool is_nan(float8_e8m0fnu scale) { return scale.bits == 255; }

/// Stores one chunk of a record's values that have no scale; `column` counts from the first of them.
template <class Record>
__device__ __forceinline__ void store_tail(std::uint8_t* data, int column, const float (&x)[kChunk], bool aligned) {
  using Tail = typename Record::Tail;
  std::uint8_t* to = data + Record::kTailAt + column * static_cast<int>(sizeof(Tail));
  if constexpr (std::is_same_v<Tail, bfloat16>) {
    cuda::Pack<bfloat16, kChunk> pack;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) pack.at[i] = to_bfloat16(x[i]);
    cuda::store_bytes(to, __builtin_bit_cast(cuda::Bytes<2 * kChunk>, pack), aligned);
  } else {
    cuda::Bytes<kChunk> codes;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) codes.at[i] = to_e4m3_saturating(x[i]).bits;
    cuda::store_bytes(to, codes, aligned);
  }
}

/// Stores one chunk of a record's quantised values, whose group has the largest magnitude amax; the lane whose chunk
/// begins the group stores the scale.
template <class Record>
__device__ __forceinline__ void store_codes(KvEntry<std::uint8_t> entry, int column, float (&x)[kChunk], float amax,
                                            KvScales scales, bool aligned) {
  using Scale = typename Record::Scale;
  std::uint8_t* scale_at = entry.scales + column / Record::kGroup * static_cast<int>(sizeof(Scale));
  const bool first = column % Record::kGroup == 0;
  if constexpr (std::is_same_v<typename Record::Element, float4_e2m1>) {
    const Scale scale = e2m1_block_scale_e4m3(amax, Record::kScaleOfZeros);
    if (first) store_unaligned(scale_at, scale);
    ByNumber(to_float(scale)).divide(x);
    cuda::store_bytes(entry.data + column / 2, cuda::e2m1_codes(x), aligned);
  } else if (std::is_same_v<Scale, float> && scales == KvScales::fp32) {
    const float scale = e4m3_block_scale_float(amax);
    if (first) store_unaligned(scale_at, scale);
    store_e4m3(x, ByNumber(scale), scale != scale, entry.data + column, aligned);
  } else {
    const float8_e8m0fnu scale = e4m3_block_scale(amax);
    if constexpr (std::is_same_v<Scale, float>) {
      if (first) store_unaligned(scale_at, to_float(scale));
    } else {
      if (first) store_unaligned(scale_at, scale);
    }
    store_e4m3(x, ByPowerOfTwo(scale), is_nan(scale), entry.data + column, aligned);
  }
}

}  // namespace dsm
