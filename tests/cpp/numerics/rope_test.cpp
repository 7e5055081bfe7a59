// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT

#include "src/numerics/rope.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <utility>

namespace dsm {
namespace {

constexpr float kEpsilon = std::numeric_limits<float>::epsilon();

TEST(RopeNumerics, FrequenciesArePowersOfTheBase) {
  double worst = 0;
  for (int d_rope : {2, 32, 48, 64, 96, 128}) {
    for (double base : {10000.0, 160000.0, 500000.0}) {
      const RopeFrequencies frequencies(d_rope, base);
      for (int i = 0; i < d_rope / 2; ++i) {
        const double truth = std::pow(base, -2.0 * i / d_rope);
        worst = std::max(worst, std::abs(frequencies(i) - truth) / truth / kEpsilon);
      }
    }
  }
  std::printf("  worst error %.2f epsilon\n", worst);
  // Roundings of the quotient, the power and the exponent; the last is magnified by ln(base) <= 13.1 times the
  // exponent, and absent where d_rope is a power of two.
  EXPECT_LE(worst, 0.5 + 0.5 + 0.5 * 13.2);
}

// The released model's frequencies, computed in float64 from the definition.
TEST(RopeNumerics, YarnOfDeepSeekV4) {
  const double golden[32] = {1.0,           6.8765602e-01, 4.7287080e-01, 3.2517246e-01, 2.2360680e-01, 1.5376456e-01,
                             1.0573713e-01, 7.2710772e-02, 5.0000000e-02, 3.4382801e-02, 2.3643540e-02, 1.6258623e-02,
                             1.1180340e-02, 7.6882281e-03, 5.2868563e-03, 3.6355386e-03, 2.2656250e-03, 1.3968013e-03,
                             8.4968973e-04, 5.0808196e-04, 2.9697778e-04, 1.6817999e-04, 9.0867843e-05, 4.5444232e-05,
                             1.9531250e-05, 5.3723127e-06, 3.6943032e-06, 2.5404098e-06, 1.7469281e-06, 1.2012856e-06,
                             8.2607130e-07, 5.6805290e-07};
  const RopeFrequencies frequencies(64, 160000,
                                    {.factor = 16, .original_length = 65536, .beta_fast = 32, .beta_slow = 1});
  double worst = 0;
  for (int i = 0; i < 32; ++i) worst = std::max(worst, std::abs(frequencies(i) - golden[i]) / golden[i] / kEpsilon);
  std::printf("  worst error %.2f epsilon\n", worst);
  EXPECT_LE(worst, 3);  // power, quotient, and three more in the ramp
}

// V3: base 10000, factor 40, trained on 4096 tokens: pairs up to 10 keep their frequency, those from 23 are divided.
TEST(RopeNumerics, YarnOfDeepSeekV3) {
  const RopeFrequencies plain(64, 10000), yarn(64, 10000, {.factor = 40, .original_length = 4096});
  for (int i = 0; i < 32; ++i) {
    if (i <= 10) {
      EXPECT_EQ(yarn(i), plain(i)) << i;
    } else if (i >= 23) {
      EXPECT_EQ(yarn(i), plain(i) / 40) << i;
    } else {
      EXPECT_LT(yarn(i), plain(i)) << i;
      EXPECT_GT(yarn(i), plain(i) / 40) << i;
    }
  }
  EXPECT_NEAR(yarn_mscale(40, 1.0), 1.3688879454, 1e-10);
  EXPECT_EQ(yarn_mscale(1, 1.0), 1);
}

TEST(RopeNumerics, FactorOneIsPlainAndRampsStayFinite) {
  const RopeFrequencies plain(64, 10000), off(64, 10000, {.factor = 1, .original_length = 17});
  for (int i = 0; i < 32; ++i) EXPECT_EQ(off(i), plain(i));
  // Equal betas whose pair is a whole number: a ramp of no length.
  const double length = 32 * 6.283185307179586;
  const RopeFrequencies step(64, 10000, {.factor = 8, .original_length = length, .beta_fast = 32, .beta_slow = 32});
  for (int i = 0; i < 32; ++i) EXPECT_EQ(step(i), i == 0 ? plain(i) : plain(i) / 8) << i;
}

TEST(RopeNumerics, AnglesAreRoundedToFloat) {
  const float frequency = 0.68765602f;
  for (std::int64_t position : {0LL, 1LL, 1048575LL, 16777217LL, -3LL}) {
    volatile float product = static_cast<float>(position) * frequency;
    EXPECT_EQ(rope_angle(position, frequency), product);
  }
}

TEST(RopeNumerics, CosineAndSineAreNearTheTruth) {
  std::mt19937 random(5);
  double worst = 0;
  for (int i = 0; i < 100000; ++i) {
    const float angle = static_cast<float>(std::ldexp(static_cast<double>(random()), -static_cast<int>(random() % 40)));
    const Rotation<float> r = rope_rotation<float>(angle);
    const long double wide = angle;
    for (auto [got, truth] : {std::pair{r.cos, std::cos(wide)}, std::pair{r.sin, std::sin(wide)}}) {
      if (truth == 0) continue;
      const float next = std::nextafter(std::abs(got), 2.0f);
      worst = std::max(worst, static_cast<double>(std::abs(got - truth) / (next - std::abs(got))));
    }
  }
  std::printf("  worst error %.6f ulp\n", worst);
  EXPECT_LE(worst, 1.6);
}

// Not inlined: beside the test's own products the compiler would have no reason to fuse these.
template <class T>
__attribute__((noinline)) void rotate_apart(Rotation<T> r, T& a, T& b) {
  rotate(r, a, b);
}

template <class T>
void check_rotation() {
  std::mt19937 random(6);
  std::uniform_real_distribution<double> uniform(-10, 10);
  for (int i = 0; i < 20000; ++i) {
    const T a = static_cast<T>(uniform(random)), b = static_cast<T>(uniform(random));
    const Rotation<T> r = rope_rotation<T>(static_cast<float>(uniform(random)));
    T x = a, y = b;
    rotate_apart(r, x, y);
    // Stored in between, so that no product can be fused into the sum.
    volatile T ac = a * r.cos, bs = b * r.sin, as = a * r.sin, bc = b * r.cos;
    volatile T p = ac - bs, q = as + bc;
    ASSERT_EQ(x, p);
    ASSERT_EQ(y, q);
    rotate_apart(inverse(r), x, y);
    ASSERT_NEAR(x, a, 40 * std::numeric_limits<T>::epsilon());
    ASSERT_NEAR(y, b, 40 * std::numeric_limits<T>::epsilon());
  }
}

TEST(RopeNumerics, RotatesWithRoundedProductsAndBack) {
  check_rotation<float>();
  check_rotation<double>();
}

}  // namespace
}  // namespace dsm
