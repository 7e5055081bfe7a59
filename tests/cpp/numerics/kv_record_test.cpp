// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/numerics/kv_record.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace dsm {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// All bfloat16 numbers >= 0, each with its neighbours among the floats.
std::vector<float> magnitudes() {
  std::vector<float> list{0};
  for (std::uint16_t bits = 1; bits < 0x7f80; ++bits) {
    const float x = to_float(bfloat16{bits});
    list.insert(list.end(), {std::nextafter(x, 0.0f), x, std::nextafter(x, kInf)});
  }
  return list;
}

/// The E4M3 number nearest to x in [2^-9, 448], ties to the even code, by trying them all.
float nearest_e4m3(double x) {
  int best = 1;
  for (int code = 2; code <= 0x7e; ++code) {
    const double distance = std::abs(to_float(float8_e4m3fn{static_cast<std::uint8_t>(code)}) - x);
    const double least = std::abs(to_float(float8_e4m3fn{static_cast<std::uint8_t>(best)}) - x);
    if (distance < least || (distance == least && code % 2 == 0)) best = code;
  }
  return to_float(float8_e4m3fn{static_cast<std::uint8_t>(best)});
}

TEST(KvScale, Float32IsTheQuotientButNeverSubnormal) {
  for (float amax : magnitudes())
    ASSERT_EQ(e4m3_block_scale_float(amax), std::max(static_cast<float>(amax / 448.0), 0x1p-126f)) << amax;
}

TEST(KvScale, E4m3IsTheNearestToASixth) {
  EXPECT_EQ(to_float(e2m1_block_scale_e4m3(0, 1)), 1);
  EXPECT_EQ(to_float(e2m1_block_scale_e4m3(0, 0x1p-9f)), 0x1p-9f);
  for (float amax : magnitudes()) {
    // What decides is the quotient in float32, as in Model Optimizer.
    const float sixth = static_cast<float>(amax / 6.0);
    const double expected = sixth == 0 ? 1 : nearest_e4m3(std::clamp<double>(sixth, 0x1p-9, 448));
    ASSERT_EQ(to_float(e2m1_block_scale_e4m3(amax, 1)), expected) << amax;
  }
}

TEST(KvScale, NanAndInfinityMakeItNan) {
  for (float amax : {kInf, std::nanf("")}) {
    EXPECT_TRUE(std::isnan(e4m3_block_scale_float(amax)));
    EXPECT_TRUE(std::isnan(to_float(e2m1_block_scale_e4m3(amax, 1))));
    EXPECT_TRUE(std::isnan(to_float(e4m3_block_scale(amax))));
  }
}

}  // namespace
}  // namespace dsm
