// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/parallel_for.h"
#include "src/numerics/e8m0.h"
#include "src/quant/blocks.h"
#include "src/quant/mxfp4_quantize/mxfp4_quantize.h"

namespace dsm {
namespace {

constexpr std::int64_t kBlock = 32;
constexpr int kLargestExponent = 2;  // of E2M1: 4 <= 6 < 8

/// Divides a block by its scale.
void scale_block(float* x, MxRule rule, float8_e8m0fnu* scale) {
  const float amax = quant::to_float(quant::amax_of(x, kBlock));
  *scale = rule == MxRule::ceil ? e2m1_block_scale(amax) : ocp_block_scale(amax, kLargestExponent);
  const float inverse = 1 / to_float(*scale);  // exact: a power of two
  for (std::int64_t i = 0; i < kBlock; ++i) x[i] *= inverse;
}

}  // namespace

void mxfp4_quantize_cpu(const Mxfp4QuantizeArgs& a, const Launch&) {
  quant::for_rows(a.x, [&](std::int64_t matrix, std::int64_t row) {
    const std::int64_t first = (matrix * a.x.size(1) + row) * a.x.size(2);
    quant::for_segments(a.x, matrix, row, [&](std::int64_t column, std::int64_t n, float* x) {
      auto* scales = a.scales.as<float8_e8m0fnu>() + (first + column) / kBlock;
      for (std::int64_t i = 0; i < n; i += kBlock) scale_block(x + i, a.rule, scales + i / kBlock);
      quant::pack(x, n, a.packed.as<std::uint8_t>() + (first + column) / 2);
    });
  });
}

}  // namespace dsm
