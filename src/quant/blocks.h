// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "dsm/tensor_view.h"
#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/numerics/fp4.h"

// What the quantisers share: walking over x block by block, in float32.

namespace dsm {

/// Blocks that cover `extent`; for every positive `block`, without overflow.
inline std::int64_t blocks_of(std::int64_t extent, std::int64_t block) {
  return extent / block + (extent % block != 0);
}

namespace quant {

/// About this many elements go to one thread at a time.
inline constexpr std::int64_t kGrainElements = 16384;
/// Elements of a row that are held in float32; a multiple of every FP4 block.
inline constexpr std::int64_t kSegment = 512;

/// x[matrix, row, column ...] in float32.
inline void read(const TensorView& x, std::int64_t matrix, std::int64_t row, std::int64_t column, std::int64_t n,
                 float* out) {
  const std::int64_t first = matrix * x.stride[0] + row * x.stride[1] + column;
  cpu::widen(x.as<const char>() + first * element_size(x.dtype), x.dtype, n, out);
}

/// The largest magnitude as the bits of a float: numbers below infinity below NaN.
using Amax = std::int32_t;
inline constexpr Amax kInfiniteAmax = 0x7f800000;

inline Amax amax_of(const float* x, std::int64_t n, Amax so_far = 0) {
  for (std::int64_t i = 0; i < n; ++i) so_far = std::max(so_far, __builtin_bit_cast(Amax, x[i]) & 0x7fffffff);
  return so_far;
}

inline float to_float(Amax amax) { return __builtin_bit_cast(float, amax); }

/// Calls body(matrix, row) for every row, in parallel.
template <class Body>
void for_rows(const TensorView& x, const Body& body) {
  const std::int64_t rows = x.size(1), grain = kGrainElements / std::max<std::int64_t>(1, x.size(2));
  parallel_for(0, x.size(0) * rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) body(i / rows, i % rows);
  });
}

/// Calls body(column, n, x) for the pieces of a row, in float32; the body may write to x.
template <class Body>
void for_segments(const TensorView& x, std::int64_t matrix, std::int64_t row, const Body& body) {
  float values[kSegment];
  for (std::int64_t column = 0; column < x.size(2); column += kSegment) {
    const std::int64_t n = std::min(kSegment, x.size(2) - column);
    read(x, matrix, row, column, n, values);
    body(column, n, values);
  }
}

/// The E2M1 codes of n elements, two neighbours in a byte.
inline void pack(const float* x, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t i = 0; i < n / 2; ++i) out[i] = pack_e2m1(to_e2m1(x[2 * i]), to_e2m1(x[2 * i + 1]));
}

}  // namespace quant
}  // namespace dsm
