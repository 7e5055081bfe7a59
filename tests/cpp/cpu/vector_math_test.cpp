// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/vector_math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "tests/cpp/cpu/each_isa.h"

namespace dsm::cpu {
namespace {

using Index = std::int64_t;
using VectorMathTest = EachIsa;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

/// Distance of `got` from the truth, in units in the last place of T at the truth (subnormals included).
template <class T>
double ulps(T got, long double truth) {
  if (static_cast<T>(truth) == got) return 0;
  int exponent;
  std::frexp(truth, &exponent);
  exponent = std::max(exponent, std::numeric_limits<T>::min_exponent);
  return static_cast<double>(std::fabs(got - truth) / std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits));
}

/// Arguments over [low, high], evenly spaced and random, and around zero by magnitude.
template <class T>
std::vector<T> arguments(double low, double high) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<double> uniform(low, high), exponent(-60, 6);
  std::vector<T> x;
  for (int i = 0; i <= 100000; ++i) x.push_back(static_cast<T>(low + (high - low) * i / 100000));
  for (int i = 0; i < 100000; ++i) x.push_back(static_cast<T>(uniform(random)));
  for (int i = 0; i < 20000; ++i)
    x.push_back(static_cast<T>((i % 2 ? 1 : -1) * std::min(high, std::exp2(exponent(random)))));
  return x;
}

template <class T, class Truth>
void expect_ulps(const char* what, const std::vector<T>& x, const std::vector<T>& y, double limit, Truth truth) {
  double worst = 0;
  T where = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double error = ulps(y[i], truth(static_cast<long double>(x[i])));
    if (error > worst) worst = error, where = x[i];
  }
  std::printf("%s, %d bits: worst error %.3f ulp at %.9g\n", what, static_cast<int>(8 * sizeof(T)), worst,
              static_cast<double>(where));
  EXPECT_LE(worst, limit) << what << " at " << where;
}

template <class T>
void expect_accurate(double lowest, double highest) {
  const std::vector<T> x = arguments<T>(lowest, highest);
  const Index n = static_cast<Index>(x.size());
  std::vector<T> y = x;
  exp_scaled<T>(y.data(), n, 1, 0);
  expect_ulps("exp", x, y, 2, [](long double v) { return std::exp(v); });
  sigmoid(x.data(), n, y.data());
  expect_ulps("sigmoid", x, y, 3, [](long double v) { return 1 / (1 + std::exp(-v)); });
  silu(x.data(), n, y.data());
  for (Index i = 0; i < n; ++i)  // where the stated bound is another
    if (std::exp(x[i]) < std::numeric_limits<T>::min()) {
      const long double v = x[i], truth = v / (1 + std::exp(-v));
      EXPECT_LE(std::fabs(y[i] - truth), -2 * v * std::numeric_limits<T>::denorm_min()) << v;
      y[i] = static_cast<T>(truth);
    }
  expect_ulps("silu", x, y, 4, [](long double v) { return v / (1 + std::exp(-v)); });
}

TEST_P(VectorMathTest, Accuracy) {
  expect_accurate<float>(-104, 88.7);
  expect_accurate<double>(-745, 709.7);
}

template <class T>
void expect_special_values() {
  std::vector<T> x = {0, -T(0), kInfinity<T>, -kInfinity<T>, kNan<T>, T(1e30), T(-1e30), T(-1e4), T(1e4)};
  const std::vector<T> argument = x;
  std::vector<T> y(x.size());
  const Index n = static_cast<Index>(x.size());
  EXPECT_TRUE(std::isnan(exp_scaled<T>(x.data(), n, 1, 0)));
  const std::vector<T> exponentials = {1, 1, kInfinity<T>, 0, kNan<T>, kInfinity<T>, 0, 0, kInfinity<T>};
  sigmoid(argument.data(), n, y.data());
  const std::vector<T> sigmoids = {T(0.5), T(0.5), 1, 0, kNan<T>, 1, 0, 0, 1};
  for (Index i = 0; i < n; ++i) {
    if (std::isnan(argument[i])) {
      EXPECT_TRUE(std::isnan(x[i]) && std::isnan(y[i]));
    } else {
      EXPECT_EQ(x[i], exponentials[i]) << argument[i];
      EXPECT_EQ(y[i], sigmoids[i]) << argument[i];
    }
  }
  silu(argument.data(), n, y.data());
  EXPECT_EQ(y[2], kInfinity<T>);
  EXPECT_TRUE(std::isnan(y[3]));
}

TEST_P(VectorMathTest, SpecialValues) {
  expect_special_values<float>();
  expect_special_values<double>();
}

template <class T>
void expect_right_at_every_length() {
  std::mt19937_64 random(3);
  for (Index n = 0; n <= 150; ++n) {
    std::vector<T> x(n + 1), y(n + 1);
    double total = 0, product = 0, largest = -kInfinity<double>;
    for (Index i = 0; i < n; ++i) {  // small integers: every order of summation is exact
      x[i] = static_cast<T>(static_cast<int>(random() % 21) - 30);
      y[i] = static_cast<T>(static_cast<int>(random() % 21) - 10);
      total += x[i];
      product += x[i] * y[i];
      largest = std::max<double>(largest, x[i]);
    }
    x[n] = y[n] = 1000;  // beyond the end
    ASSERT_EQ(sum(x.data(), n), total) << n;
    ASSERT_EQ(dot(x.data(), y.data(), n), product) << n;
    ASSERT_EQ(max(x.data(), n), largest) << n;
    if (n > 0) {
      std::vector<T> with_nan = x;
      with_nan[random() % n] = kNan<T>;
      ASSERT_FALSE(std::isnan(max(with_nan.data(), n))) << n;
      ASSERT_TRUE(std::isnan(sum(with_nan.data(), n))) << n;
    }
    std::vector<T> scaled = x;
    scale(scaled.data(), n, T(-3));
    for (Index i = 0; i < n; ++i) ASSERT_EQ(scaled[i], -3 * x[i]);
    ASSERT_EQ(scaled[n], 1000);
    const T total_of_exp = exp_scaled(x.data(), n, T(0.5), T(-3));
    double truth = 0;
    for (Index i = 0; i < n; ++i) truth += x[i];
    ASSERT_NEAR(total_of_exp, truth, 40 * std::numeric_limits<T>::epsilon() * truth) << n;
    ASSERT_EQ(x[n], 1000);
  }
}

TEST_P(VectorMathTest, EveryLength) {
  expect_right_at_every_length<float>();
  expect_right_at_every_length<double>();
}

TEST_P(VectorMathTest, ScaleAndShift) {
  std::vector<float> x = {-2, 0, 3.5f, -kInfinity<float>};
  exp_scaled(x.data(), 4, 0.25f, 0.5f);
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(x[i], std::exp(0.25 * std::vector<double>{-2, 0, 3.5}[i] - 0.5), 1e-7);
  EXPECT_EQ(x[3], 0);
}

TEST(VectorMathTest, InstructionSetsWithFusedMultiplyAddAgreeToTheBit) {
  if (!supported(Isa::avx512)) GTEST_SKIP() << "needs two such instruction sets";
  const std::vector<float> x = arguments<float>(-50, 50);
  const Index n = static_cast<Index>(x.size());
  std::vector<float> exps[2], sums;
  for (Isa isa : {Isa::avx2, Isa::avx512}) {
    set_isa_for_test(isa);
    std::vector<float>& y = exps[isa == Isa::avx512] = x;
    sums.push_back(dot(x.data(), x.data(), n - 5));
    sums.push_back(exp_scaled(y.data(), n - 5, 0.3f, 1.f));
  }
  EXPECT_EQ(exps[0], exps[1]);
  EXPECT_EQ(sums[0], sums[2]);
  EXPECT_EQ(sums[1], sums[3]);
}

DSM_INSTANTIATE_FOR_EACH_ISA(VectorMathTest);

}  // namespace
}  // namespace dsm::cpu
