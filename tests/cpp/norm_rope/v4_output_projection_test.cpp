// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <numbers>
#include <vector>

#include "dsm/error.h"
#include "dsm/norm_rope.h"

namespace dsm {
namespace {

// Two heads of three elements, each a group; the last pair of a head turns by a right angle at position 1.
struct V4OutputProjection : testing::Test {
  std::vector<double> o{1, 2, 3, 4, 5, 6}, z = std::vector<double>(4, -1);
  std::vector<double> wo_a{1, 10, 100, 0, 0, 1, 1, 10, 100, 0, 0, 1};  // [2 groups · 2, 3]
  std::vector<std::int64_t> positions{1};
  std::vector<float> inv_freq{static_cast<float>(std::numbers::pi / 2)};

  V4OutputProjectionArgs args() {
    return {.o = {o.data(), DType::float64, {1, 2, 3}},
            .positions = {positions.data(), DType::int64, {1}},
            .inv_freq = {inv_freq.data(), DType::float32, {1}},
            .wo_a = {wo_a.data(), DType::float64, {4, 3}},
            .groups = 2,
            .z = {z.data(), DType::float64, {1, 4}}};
  }

  V4OutputProjectionBackwardArgs backward_args(std::vector<double>& dz) {
    return {.dz = {dz.data(), DType::float64, {1, 4}},
            .o = args().o,
            .positions = args().positions,
            .inv_freq = args().inv_freq,
            .wo_a = args().wo_a,
            .groups = 2};
  }
};

TEST_F(V4OutputProjection, TurnsBackThenProjectsEachGroup) {
  v4_output_projection(args());
  // (2, 3) turned back by a right angle is (3, -2), (5, 6) is (6, -5).
  const std::vector<double> expected{1 + 30 - 200, -2, 4 + 60 - 500, -5};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(z[i], expected[i], 1e-4) << i;
}

TEST_F(V4OutputProjection, OneGroupReadsAllHeads) {
  V4OutputProjectionArgs a = args();
  a.groups = 1;
  a.wo_a = {wo_a.data(), DType::float64, {2, 6}};
  a.z = {z.data(), DType::float64, {1, 2}};
  v4_output_projection(a);
  EXPECT_NEAR(z[0], 1 + 30 - 200 - 5, 1e-4);  // row (1, 10, 100, 0, 0, 1)
  EXPECT_EQ(z[2], -1);
}

TEST_F(V4OutputProjection, Gradients) {
  std::vector<double> dz{1, 0, 0, 2}, d_o(6, -1), dwo_a(12, -1);
  V4OutputProjectionBackwardArgs a = backward_args(dz);
  a.d_o = {d_o.data(), DType::float64, {1, 2, 3}};
  a.dwo_a = {dwo_a.data(), DType::float64, {4, 3}};
  v4_output_projection_backward(a);
  // (10, 100) and (0, 2) turned forward; the turned heads times dz.
  const std::vector<double> expected_o{1, -100, 10, 0, -2, 0};
  const std::vector<double> expected_weights{1, 3, -2, 0, 0, 0, 0, 0, 0, 8, 12, -10};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(d_o[i], expected_o[i], 1e-5) << i;
  for (int i = 0; i < 12; ++i) EXPECT_NEAR(dwo_a[i], expected_weights[i], 1e-5) << i;
}

TEST_F(V4OutputProjection, WithoutTokensTheWeightHasAZeroGradient) {
  std::vector<double> dz, dwo_a(12, -1);
  V4OutputProjectionBackwardArgs a = backward_args(dz);
  a.dz = {nullptr, DType::float64, {0, 4}};
  a.o = {nullptr, DType::float64, {0, 2, 3}};
  a.positions = {nullptr, DType::int64, {0}};
  a.dwo_a = {dwo_a.data(), DType::float64, {4, 3}};
  v4_output_projection_backward(a);
  EXPECT_EQ(dwo_a, std::vector<double>(12, 0));
}

TEST_F(V4OutputProjection, RefusesBeforeWriting) {
  for (std::int64_t groups : {0, -1, 3}) {
    V4OutputProjectionArgs a = args();
    a.groups = groups;
    EXPECT_THROW(v4_output_projection(a), Error) << groups;
  }
  EXPECT_EQ(z[0], -1);
}

}  // namespace
}  // namespace dsm
