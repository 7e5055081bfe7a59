// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/kv_rows.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "src/core/kv_cache.h"
#include "src/cpu/convert.h"
#include "src/cpu/quantize_group.h"
#include "src/cpu/visit_record.h"

namespace dsm::cpu {
namespace {

/// The two values of every byte.
constexpr auto kE2m1Pairs = [] {
  std::array<std::array<float, 2>, 256> pairs{};
  for (int byte = 0; byte < 256; ++byte)
    pairs[byte] = {to_float(even_e2m1(static_cast<std::uint8_t>(byte))),
                   to_float(odd_e2m1(static_cast<std::uint8_t>(byte)))};
  return pairs;
}();

template <class Record, class A>
void read_record(KvEntry<const std::uint8_t> entry, A* out) {
  constexpr int kGroup = Record::kGroup;
  for (int group = 0; group < Record::kQuantized / kGroup; ++group) {
    const float scale = kv_scale<Record>(entry, group);
    A* to = out + group * kGroup;
    if constexpr (std::is_same_v<typename Record::Element, float4_e2m1>) {
      const std::uint8_t* pairs = entry.data + group * kGroup / 2;
      for (int i = 0; i < kGroup / 2; ++i) {
        to[2 * i] = kE2m1Pairs[pairs[i]][0] * scale;
        to[2 * i + 1] = kE2m1Pairs[pairs[i]][1] * scale;
      }
    } else {
      const std::uint8_t* codes = entry.data + group * kGroup;
      for (int i = 0; i < kGroup; ++i) to[i] = to_float(float8_e4m3fn{codes[i]}) * scale;
    }
  }
  for (int i = Record::kQuantized; i < Record::kWidth; ++i) out[i] = kv_tail<Record>(entry, i - Record::kQuantized);
}

template <class Record>
typename Record::Scale block_scale(float amax, KvScales scales) {
  using Scale = typename Record::Scale;
  if constexpr (std::is_same_v<Scale, float>)
    return scales == KvScales::fp32 ? e4m3_block_scale_float(amax) : to_float(e4m3_block_scale(amax));
  else if constexpr (std::is_same_v<Scale, float8_e8m0fnu>)
    return e4m3_block_scale(amax);
  else
    return e2m1_block_scale_e4m3(amax, Record::kScaleOfZeros);
}

template <class Record>
void write_record(KvEntry<std::uint8_t> entry, const float* values, KvScales scales) {
  using Scale = typename Record::Scale;
  constexpr int kGroup = Record::kGroup;
  for (int group = 0; group < Record::kQuantized / kGroup; ++group) {
    const float* from = values + group * kGroup;
    const Scale scale = block_scale<Record>(largest_magnitude(from, kGroup), scales);
    store_unaligned(entry.scales + group * static_cast<int>(sizeof(Scale)), scale);
    if constexpr (std::is_same_v<typename Record::Element, float4_e2m1>)
      encode_e2m1(from, kGroup, dsm::widen(scale), entry.data + group * kGroup / 2);
    else
      encode_e4m3(from, kGroup, dsm::widen(scale), entry.data + group * kGroup);
  }
  if constexpr (std::is_same_v<Record, KvV4Fp8>) entry.scales[Record::kScaleBytes - 1] = 0;

  using Tail = typename Record::Tail;
  std::uint8_t* tail = entry.data + Record::kTailAt;
  for (int i = 0; i < Record::kWidth - Record::kQuantized; ++i) {
    const float value = values[Record::kQuantized + i];
    if constexpr (std::is_same_v<Tail, bfloat16>)
      store_unaligned(tail + 2 * i, to_bfloat16(value));
    else
      tail[i] = to_e4m3_saturating(value).bits;
  }
}

}  // namespace

KvRows::KvRows(const TensorView& cache)
    : data_(cache.as<std::uint8_t>()),
      dtype_(cache.dtype),
      format_(kv_format(cache)),
      rows_(cache.size(0) * cache.size(1)),
      width_(kv_width(cache)),
      page_size_(cache.size(1)),
      page_bytes_(cache.stride[0] * element_size(cache.dtype)) {}

template <class A>
void KvRows::read(std::int64_t index, A* out) const {
  const std::uint8_t* page = page_of(index);
  const std::int64_t entry = index % page_size_;
  if (!format_) return widen(page + entry * width_ * element_size(dtype_), dtype_, width_, out);
  visit_record(*format_, [&]<class Record>() { read_record<Record>(kv_entry<Record>(page, page_size_, entry), out); });
}

template <class A>
void KvRows::write(std::int64_t index, const A* values, KvScales scales) const {
  std::uint8_t* page = page_of(index);
  const std::int64_t entry = index % page_size_;
  if (!format_) return narrow(values, width_, page + entry * width_ * element_size(dtype_), dtype_);
  visit_record(*format_, [&]<class Record>() {
    float row[Record::kWidth];
    std::copy_n(values, Record::kWidth, row);
    write_record<Record>(kv_entry<Record>(page, page_size_, entry), row, scales);
  });
}

template void KvRows::read(std::int64_t, float*) const;
template void KvRows::read(std::int64_t, double*) const;
template void KvRows::write(std::int64_t, const float*, KvScales) const;
template void KvRows::write(std::int64_t, const double*, KvScales) const;

}  // namespace dsm::cpu
