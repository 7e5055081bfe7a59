// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT

#include "src/numerics/e8m0.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "src/numerics/bf16.h"

namespace dsm {
namespace {

/// All positive bfloat16 numbers, the powers of two with their neighbours, and random floats.
std::vector<float> positive_floats() {
  std::vector<float> list;
  for (std::uint16_t bits = 1; bits < 0x7f80; ++bits) list.push_back(to_float(bfloat16{bits}));
  for (int e = -149; e < 128; ++e) {
    const float x = std::ldexp(1.0f, e);
    for (float y : {std::nextafter(x, 0.0f), x, std::nextafter(x, INFINITY)})
      if (y > 0) list.push_back(y);
  }
  std::mt19937 random(3);
  for (int i = 0; i < 100000; ++i)
    list.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(1 + random() % 0x7f7fffff)));
  return list;
}

/// Smallest code whose power of two is >= x, by trying them all; 254 beyond.
int ceil_by_search(double x) {
  int code = 0;
  while (code < 254 && std::ldexp(1.0, code - 127) < x) ++code;
  return code;
}

TEST(E8m0, DecodesEveryCode) {
  for (int code = 0; code < 255; ++code)
    EXPECT_EQ(static_cast<double>(to_float(float8_e8m0fnu{static_cast<std::uint8_t>(code)})),
              std::ldexp(1.0, code - 127));
  EXPECT_TRUE(std::isnan(to_float(float8_e8m0fnu{255})));
}

TEST(E8m0, FromExponentStaysInRange) {
  for (int exponent = -127; exponent <= 127; ++exponent) EXPECT_EQ(e8m0_from_exponent(exponent).bits, exponent + 127);
  EXPECT_EQ(e8m0_from_exponent(-5000).bits, 0);
  EXPECT_EQ(e8m0_from_exponent(128).bits, 254);
}

TEST(E8m0, CeilAndFloorEncloseEveryNumber) {
  for (float x : positive_floats()) {
    const int ceil = ceil_by_search(x);
    ASSERT_EQ(e8m0_ceil(x).bits, ceil) << x;
    const bool is_power = std::ldexp(1.0, ceil - 127) == x;
    const int floor = x > 0x1p127f ? 254 : (is_power ? ceil : std::max(0, ceil - 1));
    ASSERT_EQ(e8m0_floor(x).bits, floor) << x;
  }
  EXPECT_EQ(e8m0_ceil(0.0f).bits, 0);
  EXPECT_EQ(e8m0_floor(0.0f).bits, 0);
  for (float x : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(e8m0_ceil(x).bits, 255);
    EXPECT_EQ(e8m0_floor(x).bits, 255);
  }
}

TEST(E8m0, BlockScalesFollowTheReferenceRecipes) {
  // The rounded reciprocals that the recipes multiply by.
  const float by_448 = std::bit_cast<float>(0x3b124925u), by_6 = std::bit_cast<float>(0x3e2aaaabu);
  for (float amax : positive_floats()) {
    ASSERT_EQ(e4m3_block_scale(amax).bits, ceil_by_search(std::max(amax, 1e-4f) * by_448)) << amax;
    ASSERT_EQ(e2m1_block_scale(amax).bits, ceil_by_search(std::max(amax, 0x1.8p-124f) * by_6)) << amax;
  }
  EXPECT_EQ(e4m3_block_scale(0.0f).bits, 105);  // 2^-22
  EXPECT_EQ(e2m1_block_scale(0.0f).bits, 1);    // 2^-126
  EXPECT_EQ(to_float(e4m3_block_scale(448.0f)), 1.0f);
  EXPECT_EQ(to_float(e2m1_block_scale(6.0f)), 1.0f);
  EXPECT_EQ(e4m3_block_scale(std::numeric_limits<float>::quiet_NaN()).bits, 255);
  EXPECT_EQ(e2m1_block_scale(std::numeric_limits<float>::infinity()).bits, 255);
}

// For bfloat16 data the rounded reciprocal and a true division choose the same exponent.
TEST(E8m0, BlockScaleOfBfloat16IsExact) {
  for (std::uint16_t bits = 1; bits < 0x7f80; ++bits) {
    const float amax = to_float(bfloat16{bits});
    if (amax < 1e-4f) continue;
    ASSERT_EQ(e4m3_block_scale(amax).bits, ceil_by_search(amax / 448.0)) << amax;
  }
}

TEST(E8m0, OcpScaleFloorsTheExponent) {
  EXPECT_EQ(to_float(ocp_block_scale(6.0f, 2)), 1.0f);
  EXPECT_EQ(to_float(ocp_block_scale(7.99f, 2)), 1.0f);  // saturates at 6
  EXPECT_EQ(to_float(ocp_block_scale(8.0f, 2)), 2.0f);
  EXPECT_EQ(to_float(ocp_block_scale(448.0f, 8)), 1.0f);
  EXPECT_EQ(ocp_block_scale(0.0f, 2).bits, 0);
  EXPECT_EQ(ocp_block_scale(std::numeric_limits<float>::quiet_NaN(), 2).bits, 255);
}

}  // namespace
}  // namespace dsm
