// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "src/numerics/e8m0.h"
#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"
#include "tests/cpp/cpu/each_isa.h"

namespace dsm::cpu {
namespace {

using WeightsTest = EachIsa;
using Index = std::int64_t;

/// W · 1 for a unit matrix of activations: the numbers themselves, [rows, columns].
template <class Acc>
std::vector<Acc> numbers(const Weights& weights) {
  const Index k = weights.columns(), n = weights.rows();
  constexpr DType dtype = sizeof(Acc) == 4 ? DType::float32 : DType::float64;
  std::vector<Acc> unit(k * k), out(k * n), result(n * k);
  for (Index i = 0; i < k; ++i) unit[i * k + i] = 1;
  weights.multiply_transposed<Acc>(0, 0, k, n, {unit.data(), dtype, k, 1}, out.data(), n);
  for (Index i = 0; i < k; ++i)
    for (Index j = 0; j < n; ++j) result[j * k + i] = out[i * n + j];
  return result;
}

template <class Acc>
void expect_every_code() {
  std::vector<std::uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<std::uint8_t>(i & 127) == 127 ? 0 : static_cast<std::uint8_t>(i);
  const float scale = 3;
  const Weights fp8({codes.data(), DType::float8_e4m3fn, {2, 128}},
                    {.scale = {&scale, DType::float32, {1, 1}}, .block_rows = 2, .block_columns = 128});
  const std::vector<Acc> eights = numbers<Acc>(fp8);
  for (int i = 0; i < 256; ++i) ASSERT_EQ(eights[i], 3 * to_float(float8_e4m3fn{codes[i]})) << i;

  for (int i = 0; i < 256; ++i) codes[i] = static_cast<std::uint8_t>(i);
  const std::vector<std::uint8_t> powers(16, 130);
  const Weights fp4({codes.data(), DType::uint8, {2, 128}}, {.scale = {powers.data(), DType::uint8, {2, 8}}});
  const std::vector<Acc> fours = numbers<Acc>(fp4);
  for (int i = 0; i < 256; ++i) {
    ASSERT_EQ(fours[2 * i], 8 * to_float(even_e2m1(codes[i]))) << i;
    ASSERT_EQ(fours[2 * i + 1], 8 * to_float(odd_e2m1(codes[i]))) << i;
  }
}

TEST_P(WeightsTest, EveryCodeIsItsNumber) {
  expect_every_code<float>();
  expect_every_code<double>();
}

TEST_P(WeightsTest, NanIsNan) {
  const std::uint8_t codes[] = {0x38, 0x7f, 0xff, 0x38}, powers[] = {127, 255};
  std::vector<float> x{1}, y(4);
  const Weights fp8({codes, DType::float8_e4m3fn, {4, 1}},
                    {.scale = {powers, DType::float8_e8m0fnu, {2, 1}}, .block_rows = 3, .block_columns = 1});
  fp8.multiply_transposed<float>(0, 0, 1, 4, {x.data(), DType::float32, 1, 1}, y.data(), 4);
  EXPECT_EQ(y[0], 1);
  for (int i = 1; i < 4; ++i) EXPECT_TRUE(std::isnan(y[i])) << i;
}

/// Products of odd shapes, more than one panel each way, have the bits of a product with the whole matrix as numbers.
TEST_P(WeightsTest, PanelsGiveTheBitsOfOneProduct) {
  constexpr Index m = 7, rows = 300, columns = 576, block_rows = 5, block_columns = 7;
  constexpr Index scale_columns = (columns + block_columns - 1) / block_columns;
  std::mt19937 engine(1);
  std::vector<std::uint8_t> codes(2 * rows * columns);
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(engine() % 256 & 0xf7);  // no NaN
  std::vector<float> scales(2 * rows / block_rows * scale_columns), x(m * columns);
  for (float& scale : scales) scale = static_cast<float>(engine() % 1000) / 777;
  for (float& value : x) value = static_cast<float>(engine() % 2001) / 1000 - 1;
  const Weights weights({codes.data(), DType::float8_e4m3fn, {2, rows, columns}},
                        {.scale = {scales.data(), DType::float32, {2, rows / block_rows, scale_columns}},
                         .block_rows = block_rows,
                         .block_columns = block_columns});
  std::vector<float> whole(rows * columns);
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < columns; ++c)
      whole[r * columns + c] = to_float(float8_e4m3fn{codes[(rows + r) * columns + c]}) *
                               scales[(rows / block_rows + r / block_rows) * scale_columns + c / block_columns];
  for (const Index count : {Index{1}, m}) {
    std::vector<float> expected(count * rows), y(count * rows), dx(count * columns), expected_dx(count * columns);
    gemm<float>(count, rows - 2, columns, 1, {x.data(), DType::float32, columns, 1},
                {whole.data() + columns, DType::float32, 1, columns}, 0, expected.data(), rows);
    weights.multiply_transposed<float>(1, 1, count, rows - 2, {x.data(), DType::float32, columns, 1}, y.data(), rows);
    EXPECT_EQ(y, expected);
    gemm<float>(count, columns - 3, rows, 1, {x.data(), DType::float32, columns, 1},
                {whole.data() + 2, DType::float32, columns, 1}, 0, expected_dx.data(), columns);
    weights.multiply<float>(1, 2, count, columns - 3, {x.data(), DType::float32, columns, 1}, dx.data(), columns);
    EXPECT_EQ(dx, expected_dx);
  }
}

TEST(Activations, RoundToFp8) {
  std::vector<float> x(130);
  x[0] = 449, x[1] = 1.0625f, x[128] = 1.125f, x[129] = -0.0f;
  round_to_fp8(x.data(), 130);
  EXPECT_EQ(x[0], 448);  // scale 2
  EXPECT_EQ(x[1], 1);
  EXPECT_EQ(x[128], 1.125f);  // scale 2^-8: 288 is a code
  EXPECT_TRUE(std::signbit(x[129]));
  x[5] = INFINITY;
  round_to_fp8(x.data(), 130);
  for (int i = 0; i < 128; ++i) EXPECT_TRUE(std::isnan(x[i])) << i;
  EXPECT_EQ(x[128], 1.125f);
}

DSM_INSTANTIATE_FOR_EACH_ISA(WeightsTest);

}  // namespace
}  // namespace dsm::cpu
