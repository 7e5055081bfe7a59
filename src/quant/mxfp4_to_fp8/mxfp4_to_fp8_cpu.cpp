// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>

#include "src/core/parallel_for.h"
#include "src/numerics/e8m0.h"
#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"
#include "src/quant/blocks.h"
#include "src/quant/mxfp4_to_fp8/mxfp4_to_fp8.h"

namespace dsm {
namespace {

constexpr std::int64_t kGroup = 32;
constexpr std::uint8_t kNanScale = 255;
// 6 · 2^6 = 384 <= 448 < 6 · 2^7.
constexpr int kTopExponent = 6;
// Below 2^-11 no value but 0 is an E4M3 number: 6 · 2^-12 < 2^-9.
constexpr int kBottomExponent = -16;

bool all_zero(const std::uint8_t* packed) {
  std::uint8_t magnitudes = 0;
  for (std::int64_t i = 0; i < kGroup / 2; ++i) magnitudes |= packed[i] & 0x77;
  return magnitudes == 0;
}

/// The codes of a group of 32 times 2^exponent; whether all are exact.
bool convert_group(const std::uint8_t* packed, int exponent, float8_e4m3fn* data) {
  const float factor = to_float(e8m0_from_exponent(std::clamp(exponent, kBottomExponent, kTopExponent)));
  float values[kGroup];
  for (std::int64_t i = 0; i < kGroup / 2; ++i) {
    values[2 * i] = to_float(even_e2m1(packed[i])) * factor;
    values[2 * i + 1] = to_float(odd_e2m1(packed[i])) * factor;
  }
  int inexact = 0;
  for (std::int64_t i = 0; i < kGroup; ++i) {
    data[i] = to_e4m3_saturating(values[i]);
    inexact |= to_float(data[i]) != values[i];
  }
  return inexact == 0;
}

struct Block {
  std::int64_t row, row_end, group, group_end;  // rows of all matrices, groups of a row
};

void convert_block(const Mxfp4ToFp8Args& a, const Block& block, std::int64_t index) {
  const std::int64_t groups = a.group_scales.size(2);
  const auto* scales = a.group_scales.as<const float8_e8m0fnu>();
  const auto* packed = a.packed.as<const std::uint8_t>();
  int largest = 0;
  for (std::int64_t row = block.row; row < block.row_end; ++row)
    for (std::int64_t i = row * groups + block.group; i < row * groups + block.group_end; ++i)
      if (scales[i].bits != kNanScale && scales[i].bits > largest && !all_zero(packed + i * kGroup / 2))
        largest = scales[i].bits;

  const int code = std::max(0, largest - kTopExponent);
  bool exact = true;
  for (std::int64_t row = block.row; row < block.row_end; ++row)
    for (std::int64_t i = row * groups + block.group; i < row * groups + block.group_end; ++i) {
      auto* data = a.data.as<float8_e4m3fn>() + i * kGroup;
      if (scales[i].bits == kNanScale)
        std::fill_n(data, kGroup, float8_e4m3fn{float8_e4m3fn::Format::kNan});
      else
        exact &= convert_group(packed + i * kGroup / 2, scales[i].bits - code, data);
    }
  a.scales.as<float8_e8m0fnu>()[index] = {static_cast<std::uint8_t>(code)};
  a.exact.as<bool>()[index] = exact;
}

}  // namespace

void mxfp4_to_fp8_cpu(const Mxfp4ToFp8Args& a, const Launch&) {
  const std::int64_t rows = a.packed.size(1), groups = a.group_scales.size(2);
  const std::int64_t down = a.scales.size(1), across = a.scales.size(2);
  const std::int64_t block_rows = std::min(a.block_rows, rows),
                     block_groups = std::min(a.block_columns / kGroup, groups);
  const std::int64_t grain = quant::kGrainElements / kGroup / block_rows / block_groups;
  parallel_for(0, a.scales.numel(), grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      const std::int64_t first = index / across / down * rows;
      const std::int64_t row = index / across % down * block_rows, group = index % across * block_groups;
      convert_block(a,
                    {.row = first + row,
                     .row_end = first + std::min(row + block_rows, rows),
                     .group = group,
                     .group_end = std::min(group + block_groups, groups)},
                    index);
    }
  });
}

}  // namespace dsm
