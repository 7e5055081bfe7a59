// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <limits>

#include "src/core/parallel_for.h"
#include "src/numerics/e8m0.h"
#include "src/numerics/fp8.h"
#include "src/quant/blocks.h"
#include "src/quant/fp8_quantize/fp8_quantize.h"

namespace dsm {
namespace {

constexpr std::uint8_t kNan = float8_e4m3fn::Format::kNan;

struct Block {
  std::int64_t matrix, row, row_end, column, column_end;
};

/// Calls body(row, column, n) for each piece of a row of the block that fits a segment.
template <class Body>
void for_segments(const Block& block, const Body& body) {
  for (std::int64_t row = block.row; row < block.row_end; ++row)
    for (std::int64_t column = block.column; column < block.column_end; column += quant::kSegment)
      body(row, column, std::min(quant::kSegment, block.column_end - column));
}

void quantize_block(const Fp8QuantizeArgs& a, const Block& block, std::int64_t index) {
  float x[quant::kSegment];
  const bool one_segment = block.row_end - block.row == 1 && block.column_end - block.column <= quant::kSegment;
  quant::Amax amax = 0;
  for_segments(block, [&](std::int64_t row, std::int64_t column, std::int64_t n) {
    quant::read(a.x, block.matrix, row, column, n, x);
    amax = quant::amax_of(x, n, amax);
  });

  const bool finite = amax < quant::kInfiniteAmax;
  const bool power_of_two = a.scales.dtype == DType::float8_e8m0fnu;
  float scale;
  if (power_of_two) {
    const float8_e8m0fnu code = e4m3_block_scale(quant::to_float(amax));
    a.scales.as<float8_e8m0fnu>()[index] = code;
    scale = to_float(code);
  } else {
    scale = finite ? std::max(quant::to_float(amax), 1e-4f) / 448.0f : std::numeric_limits<float>::quiet_NaN();
    a.scales.as<float>()[index] = scale;
  }

  const float inverse = 1 / scale;  // exact for a power of two
  for_segments(block, [&](std::int64_t row, std::int64_t column, std::int64_t n) {
    auto* data = a.data.as<float8_e4m3fn>() + (block.matrix * a.x.size(1) + row) * a.x.size(2) + column;
    if (!finite) {
      std::fill_n(data, n, float8_e4m3fn{kNan});
      return;
    }
    if (!one_segment) quant::read(a.x, block.matrix, row, column, n, x);
    if (power_of_two) {
      for (std::int64_t i = 0; i < n; ++i) data[i] = to_e4m3_saturating(x[i] * inverse);
    } else {
      for (std::int64_t i = 0; i < n; ++i) data[i] = to_e4m3_saturating(x[i] / scale);
    }
  });
}

}  // namespace

void fp8_quantize_cpu(const Fp8QuantizeArgs& a, const Launch&) {
  const std::int64_t rows = a.x.size(1), columns = a.x.size(2);
  const std::int64_t block_rows = std::min(a.block_rows, rows), block_columns = std::min(a.block_columns, columns);
  const std::int64_t down = a.scales.size(1), across = a.scales.size(2);
  parallel_for(0, a.scales.numel(), std::max<std::int64_t>(1, quant::kGrainElements / block_rows / block_columns),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t index = begin; index < end; ++index) {
                   const std::int64_t row = index / across % down * block_rows, column = index % across * block_columns;
                   quantize_block(a,
                                  {.matrix = index / across / down,
                                   .row = row,
                                   .row_end = std::min(row + block_rows, rows),
                                   .column = column,
                                   .column_end = std::min(column + block_columns, columns)},
                                  index);
                 }
               });
}

}  // namespace dsm
