// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/weight_checks.h"

#include <algorithm>
#include <string>

namespace dsm {
namespace {

using Extents = std::array<std::int64_t, TensorView::kMaxRank>;

/// "[2, any, 4]" for the first `rank` extents.
std::string text_of(const Extents& extents, int rank) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i)
    text += (i ? ", " : "") + (extents[i] == Check::kAny ? "any" : std::to_string(extents[i]));
  return text + "]";
}

bool has_shape(const TensorView& tensor, const Extents& extents, int rank) {
  bool fits = tensor.rank == rank;
  for (int i = 0; fits && i < rank; ++i) fits = extents[i] == Check::kAny || extents[i] == tensor.shape[i];
  return fits;
}

bool is_e8m0(const TensorView& t) { return t.dtype == DType::float8_e8m0fnu || t.dtype == DType::uint8; }

void check_global(const Check& check, const std::string& argument, const TensorView& global, const TensorView& weight) {
  const int rank = weight.rank;
  const bool one = has_shape(global, {}, 0);
  const bool fits = global && global.dtype == DType::float32 && global.contiguous() &&
                    (one || has_shape(global, weight.shape, rank - 2) || has_shape(global, weight.shape, rank - 1));
  check.that(fits, argument.c_str(),
             "[], " + text_of(weight.shape, rank - 2) + " or " + text_of(weight.shape, rank - 1) +
                 " float32 and contiguous for NVFP4",
             describe(global));
}

}  // namespace

void check_weight(const Check& check, const char* argument, const TensorView& weight, const BlockScales& scales,
                  const char* shape_text, std::initializer_list<std::int64_t> shape, DType floating) {
  if (!scales) {
    check.contiguous(argument, weight, shape_text, shape, {floating});
    return;
  }
  const int rank = static_cast<int>(shape.size());
  const bool fp4 = is_fp4(weight);
  check.that(fp4 || weight.dtype == DType::float8_e4m3fn, argument,
             "of quantised codes, float8_e4m3fn or uint8 (two E2M1), where it has scales", describe(weight));
  Extents expected{};
  std::copy(shape.begin(), shape.end(), expected.begin());
  std::int64_t& columns = expected[rank - 1];
  check.that(!fp4 || columns == Check::kAny || columns % 2 == 0, argument,
             std::string(shape_text) + " with an even last extent for FP4", columns);
  if (fp4 && columns != Check::kAny) columns /= 2;
  check.that(has_shape(weight, expected, rank) && weight.contiguous(), argument,
             std::string(shape_text) + (fp4 ? ", two codes in a byte, = " : " = ") + text_of(expected, rank) +
                 " and contiguous",
             describe(weight));

  const std::string scale_name = std::string(argument) + " scales",
                    global_name = std::string(argument) + " global scale";
  const TensorView& scale = scales.scale;
  std::int64_t block_rows = 1, block_columns = 32;
  bool right_type = is_e8m0(scale);
  if (!fp4) {
    block_rows = scales.block_rows;
    block_columns = scales.block_columns;
    check.that(block_rows >= 1 && block_columns >= 1, (std::string(argument) + " block").c_str(), "of at least 1 x 1",
               std::to_string(block_rows) + " x " + std::to_string(block_columns));
    right_type = right_type || scale.dtype == DType::float32;
  } else if (scale.dtype == DType::float8_e4m3fn) {
    block_columns = 16;
    right_type = true;
  }
  check.that(right_type, scale_name.c_str(),
             fp4 ? "float8_e8m0fnu (MXFP4) or float8_e4m3fn (NVFP4)" : "float8_e8m0fnu or float32", describe(scale));
  const std::int64_t k = weight_columns(weight);
  if (fp4)
    check.that(k % block_columns == 0, argument,
               "of rows that are whole groups of " + std::to_string(block_columns) + " elements", k);
  expected = weight.shape;
  const auto blocks = [](std::int64_t extent, std::int64_t block) { return extent / block + (extent % block != 0); };
  expected[rank - 2] = blocks(weight.size(-2), block_rows);
  expected[rank - 1] = blocks(k, block_columns);
  check.that(has_shape(scale, expected, rank) && scale.contiguous(), scale_name.c_str(),
             text_of(expected, rank) + " and contiguous", describe(scale));
  if (fp4 && block_columns == 16)
    check_global(check, global_name, scales.global, weight);
  else
    check.that(!scales.global, global_name.c_str(), "absent but for NVFP4", describe(scales.global));
  check.on_device(weight.device, {{scale_name.c_str(), scale}, {global_name.c_str(), scales.global}});
}

}  // namespace dsm
