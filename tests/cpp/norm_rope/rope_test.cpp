// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <vector>

#include "dsm/error.h"
#include "dsm/norm_rope.h"

namespace dsm {
namespace {

// One head [token][5] of which the last 4 elements are rotated at frequencies π/2 and π/4.
struct Rope : testing::Test {
  std::vector<double> x{9, 1, 2, 3, 4};
  std::vector<double> y = std::vector<double>(5, -1);
  std::vector<std::int64_t> positions{1};
  std::vector<float> inv_freq{static_cast<float>(std::numbers::pi / 2), static_cast<float>(std::numbers::pi / 4)};

  RopeArgs args() {
    return {.x = {x.data(), DType::float64, {1, 1, 5}},
            .positions = {positions.data(), DType::int64, {1}},
            .inv_freq = {inv_freq.data(), DType::float32, {2}},
            .y = {y.data(), DType::float64, {1, 1, 5}}};
  }

  void expect(const std::vector<double>& expected) const {
    for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(y[i], expected[i], 1e-6) << "element " << i;
  }
};

TEST_F(Rope, InterleavedTurnsNeighbours) {
  rope(args());
  expect({9, -2, 1, (3 - 4) / std::sqrt(2.0), (3 + 4) / std::sqrt(2.0)});
}

TEST_F(Rope, HalfSplitTurnsAcrossHalves) {
  RopeArgs a = args();
  a.interleaved = false;
  rope(a);
  expect({9, -3, (2 - 4) / std::sqrt(2.0), 1, (2 + 4) / std::sqrt(2.0)});
}

TEST_F(Rope, InverseTurnsBack) {
  RopeArgs a = args();
  a.inverse = true;
  rope(a);
  expect({9, 2, -1, (3 + 4) / std::sqrt(2.0), (4 - 3) / std::sqrt(2.0)});
}

TEST_F(Rope, PositionZeroIsTheIdentity) {
  positions[0] = 0;
  rope(args());
  EXPECT_EQ(y, x);
}

TEST_F(Rope, InPlace) {
  rope(args());
  RopeArgs a = args();
  a.y = a.x;
  rope(a);
  EXPECT_EQ(x, y);
}

TEST_F(Rope, FirstDimensionsInPlaceThroughAView) {
  RopeArgs a = args();
  a.x.shape[2] = 4;
  a.y = a.x;
  a.interleaved = false;
  rope(a);
  const std::vector<double> expected{-2, (1 - 3) / std::sqrt(2.0), 9, (1 + 3) / std::sqrt(2.0), 4};
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(x[i], expected[i], 1e-6) << "element " << i;
}

TEST_F(Rope, RefusesMoreFrequenciesThanPairs) {
  std::vector<float> three(3);
  RopeArgs a = args();
  a.inv_freq = {three.data(), DType::float32, {3}};
  EXPECT_THROW(rope(a), Error);
  EXPECT_EQ(y[0], -1) << "nothing may be written before a refusal";
}

TEST(RopeFrequencies, YarnDividesSlowPairsAndKeepsFastOnes) {
  std::vector<float> plain(32), stretched(32);
  rope_frequencies({.inv_freq = {plain.data(), DType::float32, {32}}});
  rope_frequencies({.factor = 40, .inv_freq = {stretched.data(), DType::float32, {32}}});
  // DeepSeek-V3: the ramp runs from pair 10 to pair 23.
  for (int i = 0; i <= 10; ++i) EXPECT_EQ(stretched[i], plain[i]) << i;
  for (int i = 11; i < 23; ++i) EXPECT_TRUE(plain[i] / 40 < stretched[i] && stretched[i] < plain[i]) << i;
  for (int i = 23; i < 32; ++i) EXPECT_EQ(stretched[i], plain[i] / 40) << i;
}

TEST(YarnSoftmaxScale, IsThePublishedOne) {
  EXPECT_NEAR(std::sqrt(yarn_softmax_scale(192, 40) * std::sqrt(192.0)), 1.3689, 5e-5);  // DeepSeek-V3's m
  EXPECT_EQ(yarn_softmax_scale(64, 1), 0.125);
  EXPECT_EQ(yarn_softmax_scale(64, std::numbers::e, 10), 0.5);
  EXPECT_THROW(yarn_softmax_scale(0, 40), Error);
  EXPECT_THROW(yarn_softmax_scale(192, 0.5), Error);
  EXPECT_THROW(yarn_softmax_scale(192, std::nan("")), Error);
}

}  // namespace
}  // namespace dsm
