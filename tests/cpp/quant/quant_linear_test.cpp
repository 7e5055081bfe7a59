// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/quant_linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "dsm/error.h"

namespace dsm {
namespace {

constexpr std::uint8_t kOne = 0x38, kTwo = 0x40;  // E4M3

TEST(Fp8Linear, ForwardAndBackwardByHand) {
  const std::uint8_t codes[] = {kOne, kTwo, kOne, kTwo, kTwo, kTwo};
  const float scales[] = {1, 10}, x[] = {1, 2, 3}, dy[] = {1, 100};
  std::vector<float> y(2, NAN), dx(3, NAN);
  const TensorView weight(codes, DType::float8_e4m3fn, {2, 3});
  const BlockScales blocks{.scale = {scales, DType::float32, {1, 2}}, .block_rows = 128, .block_columns = 2};
  fp8_linear(
      {.x = {x, DType::float32, {1, 3}}, .weight = weight, .scales = blocks, .y = {y.data(), DType::float32, {1, 2}}});
  EXPECT_EQ(y, (std::vector<float>{1 + 4 + 30, 2 + 4 + 60}));
  fp8_linear_backward({.dy = {dy, DType::float32, {1, 2}},
                       .weight = weight,
                       .scales = blocks,
                       .dx = {dx.data(), DType::float32, {1, 3}}});
  EXPECT_EQ(dx, (std::vector<float>{201, 202, 10 + 2000}));
}

TEST(Fp4Linear, RoundedActivations) {
  std::vector<std::uint8_t> codes(16, 0x22);  // ones
  const std::uint8_t scale = 127;
  std::vector<double> x(32), y(1), dx(32);
  x[0] = 448, x[31] = 1.0625;  // the second between two codes beside the first
  const TensorView weight(codes.data(), DType::uint8, {1, 16});
  const BlockScales blocks{.scale = {&scale, DType::uint8, {1, 1}}};
  QuantLinearArgs args{.x = {x.data(), DType::float64, {1, 32}},
                       .weight = weight,
                       .scales = blocks,
                       .y = {y.data(), DType::float64, {1, 1}}};
  fp4_linear(args);
  EXPECT_EQ(y[0], 449.0625);
  args.activation_format = ActivationFormat::fp8;
  fp4_linear(args);
  EXPECT_EQ(y[0], 449);
  fp4_linear_backward({.dy = {y.data(), DType::float64, {1, 1}},
                       .weight = weight,
                       .scales = blocks,
                       .dx = {dx.data(), DType::float64, {1, 32}}});
  EXPECT_EQ(dx, std::vector<double>(32, 449));
}

TEST(QuantLinear, RefusesBeforeWriting) {
  const std::uint8_t codes[64] = {};
  const float scales[4] = {1, 1, 1, 1}, x[64] = {};
  std::vector<float> y(2, 7);
  const auto args = [&](const BlockScales& blocks) {
    return QuantLinearArgs{.x = {x, DType::float32, {1, 32}},
                           .weight = {codes, DType::float8_e4m3fn, {2, 32}},
                           .scales = blocks,
                           .y = {y.data(), DType::float32, {1, 2}}};
  };
  EXPECT_THROW(fp8_linear(args({})), Error);
  EXPECT_THROW(fp8_linear(args({.scale = {scales, DType::float32, {1, 2}}, .block_rows = 2, .block_columns = 0})),
               Error);
  EXPECT_THROW(fp8_linear(args({.scale = {scales, DType::float32, {1, 2}}, .block_rows = 2, .block_columns = 32})),
               Error);
  EXPECT_THROW(fp8_linear(args({.scale = {scales, DType::float32, {2, 32}}, .global = {scales, DType::float32, {1}}})),
               Error);
  EXPECT_THROW(fp4_linear(args({.scale = {scales, DType::uint8, {2, 1}}})), Error);
  EXPECT_EQ(y, std::vector<float>(2, 7));
}

}  // namespace
}  // namespace dsm
