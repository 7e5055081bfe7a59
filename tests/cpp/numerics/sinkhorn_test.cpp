// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/numerics/sinkhorn.h"

#include <gtest/gtest.h>

#include <vector>

namespace dsm {
namespace {

TEST(Sinkhorn, OneIterationIsOneDivisionByTheColumnSums) {
  std::vector<double> c{1, 2, 3, 6};
  sinkhorn(c.data(), 2, 1, 0.0);
  EXPECT_EQ(c, (std::vector<double>{0.25, 0.25, 0.75, 0.75}));
}

TEST(Sinkhorn, RowsComeBeforeColumns) {
  std::vector<double> c{1, 2, 3, 2};
  sinkhorn(c.data(), 2, 2, 0.0);
  // Columns: 1/4 1/2 3/4 1/2; rows: 1/3 2/3 3/5 2/5; columns again.
  const std::vector<double> expected{5. / 14, 5. / 8, 9. / 14, 3. / 8};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(c[i], expected[i], 1e-15) << i;
}

TEST(Sinkhorn, EpsIsAddedToTheSums) {
  std::vector<float> c{3};
  sinkhorn(c.data(), 1, 1, 1.0f);
  EXPECT_EQ(c[0], 0.75f);
}

TEST(Sinkhorn, GradientMatchesDifferences) {
  constexpr int kN = 3, kIterations = 4;
  constexpr double kEps = 0.01, kStep = 1e-6;
  const std::vector<double> start{0.5, 0.3, 0.9, 0.1, 0.8, 0.4, 0.7, 0.2, 0.6};
  const std::vector<double> weights{1, -2, 3, 0.5, 1.5, -1, 2, 0, -3};
  const auto weighted = [&](std::vector<double> c) {
    sinkhorn(c.data(), kN, kIterations, kEps);
    double sum = 0;
    for (int i = 0; i < kN * kN; ++i) sum += weights[i] * c[i];
    return sum;
  };
  std::vector<double> c = start, record(sinkhorn_record_size(kN, kIterations)), gradient = weights;
  sinkhorn(c.data(), kN, kIterations, kEps, record.data());
  sinkhorn_backward(record.data(), kN, kIterations, gradient.data());
  for (int i = 0; i < kN * kN; ++i) {
    std::vector<double> up = start, down = start;
    up[i] += kStep;
    down[i] -= kStep;
    EXPECT_NEAR(gradient[i], (weighted(up) - weighted(down)) / (2 * kStep), 1e-8) << i;
  }
}

}  // namespace
}  // namespace dsm
