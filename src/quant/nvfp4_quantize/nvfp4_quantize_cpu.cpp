// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "src/numerics/fp8.h"
#include "src/quant/blocks.h"
#include "src/quant/nvfp4_quantize/nvfp4_quantize.h"

namespace dsm {
namespace {

constexpr std::int64_t kBlock = 16;

void find_global_scales(const Nvfp4QuantizeArgs& a) {
  const std::int64_t matrices = a.x.size(0), rows = a.x.size(1);
  std::vector<quant::Amax> of_row(matrices * rows);
  quant::for_rows(a.x, [&](std::int64_t matrix, std::int64_t row) {
    quant::Amax amax = 0;
    quant::for_segments(a.x, matrix, row,
                        [&](std::int64_t, std::int64_t n, const float* x) { amax = quant::amax_of(x, n, amax); });
    of_row[matrix * rows + row] = amax;
  });
  for (std::int64_t matrix = 0; matrix < matrices; ++matrix) {
    quant::Amax amax = 0;
    for (std::int64_t row = 0; row < rows; ++row) amax = std::max(amax, of_row[matrix * rows + row]);
    a.global_scale.as<float>()[matrix] = quant::to_float(amax) / 2688.0f;
  }
}

float8_e4m3fn block_scale(quant::Amax amax, float global_scale) {
  if (amax >= quant::kInfiniteAmax) return {float8_e4m3fn::Format::kNan};
  const float t = quant::to_float(amax) / (6.0f * global_scale);
  if (amax == 0 || t == 0) return to_e4m3_saturating(1.0f);
  return to_e4m3_saturating(t < 0x1p-9f ? 0x1p-9f : t);
}

/// Divides a block by its step.
void scale_block(float* x, float global_scale, float8_e4m3fn* scale) {
  const quant::Amax amax = quant::amax_of(x, kBlock);
  *scale = block_scale(amax, global_scale);
  // A block of zeros stays zero also where the factor is 0.
  const float step = amax == 0 ? 1.0f : to_float(*scale) * global_scale;
  // Adding 0 turns -0 into 0.
  for (std::int64_t i = 0; i < kBlock; ++i) x[i] = x[i] / step + 0.0f;
}

}  // namespace

void nvfp4_quantize_cpu(const Nvfp4QuantizeArgs& a, const Launch&) {
  if (a.given)
    std::copy_n(a.given.as<const float>(), a.x.size(0), a.global_scale.as<float>());
  else
    find_global_scales(a);
  quant::for_rows(a.x, [&](std::int64_t matrix, std::int64_t row) {
    const float global_scale = a.global_scale.as<const float>()[matrix];
    const std::int64_t first = (matrix * a.x.size(1) + row) * a.x.size(2);
    quant::for_segments(a.x, matrix, row, [&](std::int64_t column, std::int64_t n, float* x) {
      auto* scales = a.scales.as<float8_e4m3fn>() + (first + column) / kBlock;
      for (std::int64_t i = 0; i < n; i += kBlock) scale_block(x + i, global_scale, scales + i / kBlock);
      quant::pack(x, n, a.packed.as<std::uint8_t>() + (first + column) / 2);
    });
  });
}

}  // namespace dsm
