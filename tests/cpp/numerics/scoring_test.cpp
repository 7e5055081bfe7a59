// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT

#include "src/numerics/scoring.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace dsm {
namespace {

using Wide = long double;

// The definitions, in a type whose range and precision hide the naive formulas' faults.
Wide sigmoid_truth(Wide x) { return 1 / (1 + std::exp(-x)); }
Wide sigmoid_slope_truth(Wide x) { return sigmoid_truth(x) * sigmoid_truth(-x); }
Wide silu_truth(Wide x) { return x * sigmoid_truth(x); }
Wide silu_slope_truth(Wide x) { return sigmoid_truth(x) + x * sigmoid_slope_truth(x); }
Wide softplus_truth(Wide x) { return x > 20 ? x : std::log1p(std::exp(x)); }
Wide softplus_slope_truth(Wide x) { return x > 20 ? 1 : sigmoid_truth(x); }
Wide sqrt_softplus_truth(Wide x) { return std::sqrt(softplus_truth(x)); }
Wide sqrt_softplus_slope_truth(Wide x) { return softplus_slope_truth(x) / (2 * sqrt_softplus_truth(x)); }

/// Worst error over [-limit, limit], in units of T's epsilon relative to the truth (silu' crosses zero near -1.28:
/// there relative to 0.1).
template <class T, class F>
double worst_error(F f, Wide (*truth)(Wide), T limit) {
  double worst = 0;
  for (int i = -20000; i <= 20000; ++i) {
    const T x = limit * static_cast<T>(i) / 20000;
    const Wide expected = truth(x);
    const Wide scale = std::abs(x + T(1.28)) < T(0.5) ? std::max<Wide>(std::abs(expected), 0.1L) : std::abs(expected);
    if (scale == 0) continue;
    const Wide error = std::abs(f(x) - expected) / scale / std::numeric_limits<T>::epsilon();
    if (!(error <= worst)) worst = static_cast<double>(error);
  }
  return worst;
}

template <class T>
void check_all(const char* type, T exp_is_normal) {
  const struct {
    const char* name;
    T (*f)(T);
    Wide (*truth)(Wide);
    T limit;
    double tolerance;  // epsilons: about one per rounding in the formula
  } rows[] = {
      {"sigmoid", [](T x) { return sigmoid(x); }, sigmoid_truth, exp_is_normal, 3},
      {"sigmoid'", [](T x) { return sigmoid_derivative(x); }, sigmoid_slope_truth, exp_is_normal, 4},
      {"silu", [](T x) { return silu(x); }, silu_truth, exp_is_normal, 4},
      {"silu'", [](T x) { return silu_derivative(x); }, silu_slope_truth, exp_is_normal, 8},
      {"softplus", [](T x) { return softplus(x); }, softplus_truth, exp_is_normal, 3},
      {"softplus'", [](T x) { return softplus_derivative(x); }, softplus_slope_truth, exp_is_normal, 3},
      {"sqrt_softplus", [](T x) { return sqrt_softplus(x); }, sqrt_softplus_truth, 2 * exp_is_normal, 3},
      {"sqrt_softplus'", [](T x) { return sqrt_softplus_derivative(x); }, sqrt_softplus_slope_truth, 2 * exp_is_normal,
       4},
  };
  for (const auto& row : rows) {
    const double worst = worst_error<T>(row.f, row.truth, row.limit);
    std::printf("  %-7s %-15s worst error %.2f epsilon\n", type, row.name, worst);
    EXPECT_LE(worst, row.tolerance) << type << " " << row.name;
  }
}

TEST(Scoring, MatchesTheDefinitions) {
  check_all<float>("float", 87);
  check_all<double>("double", 708);
}

TEST(Scoring, SqrtSoftplusOfTheSpecification) {
  const double golden[][2] = {{-3, 0.2204254},  {-1, 0.5596979}, {0, 0.8325546},
                              {0.5, 0.9869534}, {2, 1.4583991},  {25, 5.0}};
  for (const auto& [x, y] : golden) {
    EXPECT_NEAR(sqrt_softplus(x), y, 5e-8);
    EXPECT_NEAR(sqrt_softplus(static_cast<float>(x)), y, 5e-7);
  }
}

// Slopes of the long double definitions by central differences: the derivative formulas themselves.
TEST(Scoring, DerivativesAreTheSlopes) {
  const struct {
    Wide (*f)(Wide);
    double (*slope)(double);
  } rows[] = {{sigmoid_truth, [](double x) { return sigmoid_derivative(x); }},
              {silu_truth, [](double x) { return silu_derivative(x); }},
              {softplus_truth, [](double x) { return softplus_derivative(x); }},
              {sqrt_softplus_truth, [](double x) { return sqrt_softplus_derivative(x); }}};
  for (const auto& row : rows) {
    for (double x = -50; x <= 50; x += 0.37) {
      const Wide h = 1e-5L;
      if (std::abs(x - 20) < 0.01) continue;  // softplus' threshold
      const Wide slope = (row.f(x + h) - row.f(x - h)) / (2 * h);
      EXPECT_NEAR(row.slope(x), static_cast<double>(slope), 1e-9) << x;
    }
  }
}

template <class T>
void check_limits() {
  constexpr T kInf = std::numeric_limits<T>::infinity(), kNan = std::numeric_limits<T>::quiet_NaN();
  for (T big : {T(1000), std::numeric_limits<T>::max(), kInf}) {
    EXPECT_EQ(sigmoid(big), 1);
    EXPECT_EQ(sigmoid(-big), 0);
    EXPECT_EQ(sigmoid_derivative(big), 0);
    EXPECT_EQ(sigmoid_derivative(-big), 0);
    EXPECT_EQ(silu(big), big);
    EXPECT_EQ(softplus(big), big);
    EXPECT_EQ(softplus(-big), 0);
    EXPECT_EQ(softplus_derivative(big), 1);
    EXPECT_EQ(sqrt_softplus(big), std::sqrt(big));
    EXPECT_EQ(sqrt_softplus_derivative(big), 1 / (2 * std::sqrt(big)));
  }
  for (T big : {T(2000), std::numeric_limits<T>::max()}) {
    EXPECT_EQ(silu(-big), 0);
    EXPECT_EQ(silu_derivative(big), 1);
    EXPECT_EQ(silu_derivative(-big), 0);
    EXPECT_EQ(sqrt_softplus(-big), 0);
    EXPECT_EQ(sqrt_softplus_derivative(-big), 0);
  }
  EXPECT_EQ(sqrt_softplus(-kInf), 0);
  EXPECT_EQ(sqrt_softplus_derivative(-kInf), 0);
  for (T y : {sigmoid(kNan), sigmoid_derivative(kNan), silu(kNan), silu_derivative(kNan), softplus(kNan),
              softplus_derivative(kNan), sqrt_softplus(kNan), sqrt_softplus_derivative(kNan)})
    EXPECT_TRUE(std::isnan(y));
}

TEST(Scoring, LimitsAndNan) {
  check_limits<float>();
  check_limits<double>();
}

}  // namespace
}  // namespace dsm
