// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// Quantised weights as numbers. Included only by kernels_*.cpp: see vectors.h.

#include "src/cpu/kernels.h"
#include "src/cpu/vectors.h"

namespace dsm::cpu {
namespace {

// Storage of the codes.
struct Float8E4M3 {
  std::uint8_t bits;
};
struct Float4Pair {
  std::uint8_t bits;
};

template <class Code>
constexpr int kPerByte = 1;
template <>
constexpr int kPerByte<Float4Pair> = 2;

/// N codes as floats; exact.
template <int N>
inline Vector<float, N> widen(const Float8E4M3* source) {
  const auto bytes = load_bytes<Vector<std::uint8_t, N>>(source);
#if defined(__F16C__)
  // In the place of float16's exponent and mantissa a code stands for 2^-8 of its value, subnormal or not.
  using Half = Vector<std::uint16_t, N>;
  if constexpr (N == 8 || N == kLanes<float>) {
    const Half code = __builtin_convertvector(bytes, Half), magnitude = code << 7 & 0x3f80;
    const Half number = magnitude | (code << 8 & 0x8000);
    const Half half = select<Half>(bit_cast<Half>(magnitude == 0x3f80), Half{} + 0x7e00, number);
    return widen<N>(reinterpret_cast<const Float16*>(&half)) * 0x1p8f;
  }
#endif
  using F = Vector<float, N>;
  using I = Vector<std::int32_t, N>;
  const I code = __builtin_convertvector(bytes, I), magnitude = code & 0x7f;
  const I normal = (magnitude << 20) + ((127 - 7) << 23);
  const I subnormal = bit_cast<I>(__builtin_convertvector(magnitude, F) * 0x1p-9f);
  const I number = select<I>(magnitude < 8, subnormal, normal);
  return bit_cast<F>(select<I>(magnitude == 0x7f, I{} + 0x7fc00000, number) | (code & 0x80) << 24);
}

template <int N>
inline Vector<float, N> widen(const Float4Pair* source) {
  using F = Vector<float, N>;
  using I = Vector<std::int32_t, N>;
  if constexpr (N == 16) {  // every lane shifts its code to the low bits, which a table lookup reads
    std::int64_t word;
    __builtin_memcpy(&word, source, sizeof word);
    const I halves = bit_cast<I>(Vector<std::int64_t, 8>{} + word);
    const I code = __builtin_shufflevector(halves, halves, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1) >>
                   I{0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    return __builtin_shuffle(F{0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6}, code & 15);
  } else if constexpr (N == 8) {
    std::int32_t word;
    __builtin_memcpy(&word, source, sizeof word);
    const I code = (I{} + word) >> I{0, 4, 8, 12, 16, 20, 24, 28};
    const F magnitude = __builtin_shuffle(F{0, .5f, 1, 1.5f, 2, 3, 4, 6}, code & 7);
    return bit_cast<F>(bit_cast<I>(magnitude) | (code & 8) << 28);
  } else {
    I code;
    for (int l = 0; l < N; ++l) code[l] = source[l / 2].bits >> l % 2 * 4;
    const I magnitude = code & 7, normal = (magnitude << 22) + ((127 - 1) << 23);
    const I subnormal = bit_cast<I>(__builtin_convertvector(magnitude, F) * 0.5f);
    return bit_cast<F>(select<I>(magnitude < 2, subnormal, normal) | (code & 8) << 28);
  }
}

template <class Code, class T>
void dequantize_codes(const QuantizedRow<T>& row, T* out) {
  constexpr int lanes = kLanes<T>, per_byte = kPerByte<Code>;
  const Code* codes = reinterpret_cast<const Code*>(row.codes);
  const T* scale = row.scales;
  const Vector<T> factor = broadcast(row.factor);
  Index j = 0;
  for (Index end = row.in_first_block; j < row.n; end += row.block) {
    if (end > row.n) end = row.n;
    const Vector<T> block_scale = broadcast(*scale++);
    for (; j + lanes <= end; j += lanes) store(out + j, load<T>(codes + j / per_byte) * block_scale * factor);
    if (j == end) continue;
    Code rest[lanes] = {};
    T numbers[lanes];
    for (Index l = 0; j + l < end; l += per_byte) rest[l / per_byte] = codes[(j + l) / per_byte];
    store(numbers, load<T>(rest) * block_scale * factor);
    for (Index l = 0; j < end; ++l) out[j++] = numbers[l];
  }
}

template <class T>
void dequantize(const QuantizedRow<T>& row, T* out) {
  if (row.fp4)
    dequantize_codes<Float4Pair>(row, out);
  else
    dequantize_codes<Float8E4M3>(row, out);
}

}  // namespace
}  // namespace dsm::cpu
