// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <numbers>
#include <vector>

#include "dsm/error.h"
#include "dsm/norm_rope.h"

namespace dsm {
namespace {

// One head (1, 7, 3, 4, 5): mean square 20. The last pair turns by a right angle at position 1.
struct V4QNormRope : testing::Test {
  std::vector<double> q{1, 7, 3, 4, 5}, y = std::vector<double>(5, -1), rstd{-1};
  std::vector<std::int64_t> positions{1};
  std::vector<float> inv_freq{static_cast<float>(std::numbers::pi / 2)};

  V4QNormRopeArgs args() {
    return {.q = {q.data(), DType::float64, {1, 1, 5}},
            .positions = {positions.data(), DType::int64, {1}},
            .inv_freq = {inv_freq.data(), DType::float32, {1}},
            .eps = 5,
            .y = {y.data(), DType::float64, {1, 1, 5}},
            .rstd = {rstd.data(), DType::float64, {1, 1}}};
  }
};

TEST_F(V4QNormRope, NormalisesTheWholeHeadAndTurnsItsEnd) {
  v4_q_norm_rope(args());
  EXPECT_EQ(rstd[0], 0.2);
  const std::vector<double> expected{0.2, 1.4, 0.6, -1, 0.8};
  for (int i = 0; i < 5; ++i) EXPECT_NEAR(y[i], expected[i], 1e-7) << i;
}

TEST_F(V4QNormRope, GradientTurnsBack) {
  v4_q_norm_rope(args());
  std::vector<double> dy{0, 0, 0, 0, 1}, dq(5, -1);  // before the rotation, the gradient is that of element 3
  v4_q_norm_rope_backward({.dy = {dy.data(), DType::float64, {1, 1, 5}},
                           .q = args().q,
                           .positions = args().positions,
                           .inv_freq = args().inv_freq,
                           .rstd = args().rstd,
                           .dq = {dq.data(), DType::float64, {1, 1, 5}}});
  for (int i = 0; i < 5; ++i) {
    const double pull = 4 * 0.2 * 0.2 / 5;
    EXPECT_NEAR(dq[i], 0.2 * ((i == 3) - q[i] * pull), 1e-7) << i;
  }
}

TEST_F(V4QNormRope, RefusesBeforeWriting) {
  V4QNormRopeArgs a = args();
  a.eps = -1;
  EXPECT_THROW(v4_q_norm_rope(a), Error);
  a = args();
  a.rstd.dtype = DType::float32;
  EXPECT_THROW(v4_q_norm_rope(a), Error);
  EXPECT_EQ(y[0], -1);
  EXPECT_EQ(rstd[0], -1);
}

}  // namespace
}  // namespace dsm
