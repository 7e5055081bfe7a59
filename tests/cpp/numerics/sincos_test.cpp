// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/numerics/sincos.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>

#include "src/numerics/float_format.h"

namespace dsm {
namespace {

// Units in the last place of `rounded` between it and the double value.
double error_in_ulps(float rounded, double exact) {
  const float next = std::nextafter(std::fabs(rounded), 2.0f);
  return std::fabs(rounded - exact) / (next - std::fabs(rounded));
}

TEST(SinCos, StaysNearTheTruthForEveryMagnitude) {
  std::mt19937 random(0);
  double worst = 0;
  for (int i = 0; i < 2000000; ++i) {
    const float angle = __builtin_bit_cast(float, static_cast<std::uint32_t>(random()));
    if (!std::isfinite(angle)) continue;
    const SinCos<float> result = sincos(angle);
    worst = std::max({worst, error_in_ulps(result.sin, std::sin(double{angle})),
                      error_in_ulps(result.cos, std::cos(double{angle}))});
  }
  std::printf("worst error %.4f units in the last place\n", worst);
  EXPECT_LE(worst, 1.6);
}

TEST(SinCos, NearMultiplesOfAQuarterTurn) {
  // The floats nearest to k · π/2, where the reduction cancels most.
  double worst = 0;
  for (int k = 1; k < 1 << 20; k += 1 + k / 100000) {
    const float angle = static_cast<float>(k * 1.5707963267948966);
    const SinCos<float> result = sincos(angle);
    worst = std::max({worst, error_in_ulps(result.sin, std::sin(double{angle})),
                      error_in_ulps(result.cos, std::cos(double{angle}))});
  }
  std::printf("worst error %.4f units in the last place\n", worst);
  EXPECT_LE(worst, 1.6);
}

TEST(SinCos, NoAngleNoResult) {
  for (const float angle : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_TRUE(std::isnan(sincos(angle).sin));
    EXPECT_TRUE(std::isnan(sincos(angle).cos));
  }
}

}  // namespace
}  // namespace dsm
