// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/bf16.h"
#include "src/numerics/e8m0.h"
#include "src/numerics/float_traits.h"
#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"
#include "src/numerics/host_device.h"

// The rows of quantised caches (dsm/kv_cache.h says what they hold) as bytes: where the parts of a row are, and what a
// part's codes mean. A record has kQuantized elements in groups of kGroup, each group with a scale, and then Tail
// values that have none. Nothing is assumed of alignment.

namespace dsm {

struct KvV32Fp8 {
  using Element = float8_e4m3fn;
  using Scale = float;
  using Tail = bfloat16;
  static constexpr int kWidth = 576, kQuantized = 512, kGroup = 128;
  static constexpr int kBytes = 656, kScalesAt = 512, kTailAt = 528;
};

struct KvV32Nvfp4 {
  using Element = float4_e2m1;
  using Scale = float8_e4m3fn;
  using Tail = float8_e4m3fn;
  static constexpr int kWidth = 576, kQuantized = 512, kGroup = 16;
  static constexpr int kBytes = 352, kTailAt = 256, kScalesAt = 320;
  static constexpr float kScaleOfZeros = 1;
};

struct KvV4Fp8 {
  using Element = float8_e4m3fn;
  using Scale = float8_e8m0fnu;
  using Tail = bfloat16;
  static constexpr int kWidth = 512, kQuantized = 448, kGroup = 64;
  static constexpr int kBytes = 584, kTailAt = 448;
  /// All entries' scales follow all entries' data.
  static constexpr int kDataBytes = 576, kScaleBytes = 8;
};

struct KvV41Fp8 {
  using Element = float8_e4m3fn;
  using Scale = float8_e8m0fnu;
  using Tail = bfloat16;  // of which there are none
  static constexpr int kWidth = 512, kQuantized = 512, kGroup = 32;
  static constexpr int kBytes = 528, kScalesAt = 512, kTailAt = 512;
};

struct KvV41Fp4 {
  using Element = float4_e2m1;
  using Scale = float8_e4m3fn;
  using Tail = bfloat16;  // of which there are none
  static constexpr int kWidth = 512, kQuantized = 512, kGroup = 16;
  static constexpr int kBytes = 288, kScalesAt = 256, kTailAt = 256;
  static constexpr float kScaleOfZeros = 0x1p-9f;
};

/// Where a row's bytes are. Byte is std::uint8_t, const or not.
template <class Byte>
struct KvEntry {
  Byte* data;
  Byte* scales;
};

template <class Record, class Byte>
DSM_HD_INLINE KvEntry<Byte> kv_entry(Byte* page, std::int64_t page_size, std::int64_t entry) {
  if constexpr (requires { Record::kScalesAt; }) {
    Byte* data = page + entry * Record::kBytes;
    return {data, data + Record::kScalesAt};
  } else {
    return {page + entry * Record::kDataBytes, page + page_size * Record::kDataBytes + entry * Record::kScaleBytes};
  }
}

/// An entry of the indexer's cache: d E4M3 elements, and a float scale behind all entries' elements.
template <class Byte>
DSM_HD_INLINE KvEntry<Byte> indexer_entry(Byte* page, std::int64_t page_size, std::int64_t d, std::int64_t entry) {
  return {page + entry * d, page + page_size * d + entry * static_cast<std::int64_t>(sizeof(float))};
}

/// A number of a storage type at any address.
template <class T>
DSM_HD_INLINE T load_unaligned(const std::uint8_t* bytes) {
  T value;
  __builtin_memcpy(&value, bytes, sizeof value);
  return value;
}

template <class T>
DSM_HD_INLINE void store_unaligned(std::uint8_t* bytes, T value) {
  __builtin_memcpy(bytes, &value, sizeof value);
}

/// The scale of a group.
template <class Record, class Byte>
DSM_HD_INLINE float kv_scale(KvEntry<Byte> entry, int group) {
  using Scale = typename Record::Scale;
  return widen(load_unaligned<Scale>(entry.scales + group * static_cast<int>(sizeof(Scale))));
}

/// A value that has no scale; i counts from kQuantized.
template <class Record, class Byte>
DSM_HD_INLINE float kv_tail(KvEntry<Byte> entry, int i) {
  using Tail = typename Record::Tail;
  return to_float(load_unaligned<Tail>(entry.data + Record::kTailAt + i * static_cast<int>(sizeof(Tail))));
}

// Scales from amax = the largest magnitude in the group. A NaN or infinity in the group makes the scale NaN, and with
// it all values of the group.

/// E4M3 groups with float32 scales: max(amax / 448, smallest normal float). Source: vLLM's cache writer.
DSM_HD_INLINE constexpr float e4m3_block_scale_float(float amax) {
  constexpr float kSmallest = 0x1p-126f, kNan = __builtin_nanf("");
  const float scale = amax / 448.0f;
  return bits_of(amax) >= 0x7f800000 ? kNan : (scale < kSmallest ? kSmallest : scale);
}

/// E2M1 groups with E4M3 scales: amax / 6 limited to [2^-9, 448] and rounded to nearest, so that values beyond 6 · 448
/// saturate; `of_zeros` where amax / 6 is zero. Sources: NVIDIA Model Optimizer, nvfp4_tensor.py (with global scale 1);
/// DeepSeek-V4.1 reference code.
DSM_HD_INLINE constexpr float8_e4m3fn e2m1_block_scale_e4m3(float amax, float of_zeros) {
  const float scale = amax / 6.0f;
  const float limited = scale == 0 ? of_zeros : (scale < 0x1p-9f ? 0x1p-9f : scale);
  return bits_of(amax) >= 0x7f800000 ? float8_e4m3fn{float8_e4m3fn::Format::kNan} : to_e4m3_saturating(limited);
}

}  // namespace dsm
