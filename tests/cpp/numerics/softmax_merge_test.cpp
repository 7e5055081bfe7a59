// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT

#include "src/numerics/softmax_merge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace dsm {
namespace {

/// The state of scores [begin, end), one key at a time.
template <class T>
SoftmaxState<T> state_of(const std::vector<T>& scores, int begin, int end) {
  SoftmaxState<T> state;
  for (int i = begin; i < end; ++i) state = merge(state, SoftmaxState<T>{scores[i], T(scores[i] != -kInfinity<T>)});
  return state;
}

template <class T>
double lse_truth(const std::vector<T>& scores, int begin, int end) {
  long double m = -INFINITY, sum = 0;
  for (int i = begin; i < end; ++i) m = std::max<long double>(m, scores[i]);
  if (m == -INFINITY) return -INFINITY;
  for (int i = begin; i < end; ++i) sum += std::exp(scores[i] - m);
  return static_cast<double>(m + std::log(sum));
}

template <class T>
std::vector<T> random_scores(std::mt19937& random, int count) {
  std::normal_distribution<double> normal(0, 20);
  std::vector<T> scores(count);
  for (T& score : scores) score = random() % 4 == 0 ? -kInfinity<T> : static_cast<T>(normal(random));
  return scores;
}

template <class T>
void check_random_splits(double tolerance) {
  std::mt19937 random(11);
  double worst = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const int n = static_cast<int>(random() % 40), cut = n ? static_cast<int>(random() % (n + 1)) : 0;
    const std::vector<T> scores = random_scores<T>(random, n);
    const SoftmaxState<T> a = state_of(scores, 0, cut), b = state_of(scores, cut, n);
    const MergedLse<T> merged = merge_lse(lse(a), lse(b));
    const double truth = lse_truth(scores, 0, n);
    if (std::isinf(truth)) {
      EXPECT_EQ(lse(merge(a, b)), -kInfinity<T>);
      EXPECT_EQ(merged.lse, -kInfinity<T>);
      EXPECT_EQ(merged.a, 0);
      EXPECT_EQ(merged.b, 0);
      continue;
    }
    const double scale = 1 + std::abs(truth);  // an lse is a logarithm: its error is absolute up to 1
    const double weight_a = std::exp(lse_truth(scores, 0, cut) - truth);
    for (double error : {std::abs(lse(merge(a, b)) - truth) / scale, std::abs(merged.lse - truth) / scale,
                         std::abs(merged.a - weight_a) / scale, std::abs(merged.b - (1 - weight_a)) / scale}) {
      if (!(error <= worst)) worst = error;
    }
    // The order of the parts does not change a bit.
    const MergedLse<T> swapped = merge_lse(lse(b), lse(a));
    EXPECT_EQ(swapped.lse, merged.lse);
    EXPECT_EQ(swapped.a, merged.b);
    EXPECT_EQ(swapped.b, merged.a);
    EXPECT_EQ(merge(a, b).l, merge(b, a).l);
  }
  std::printf("  worst error %.2f epsilon\n", worst / std::numeric_limits<T>::epsilon());
  EXPECT_LE(worst, tolerance * std::numeric_limits<T>::epsilon());
}

// Up to 40 additions, and lse's own rounding which exp turns into an absolute error of the weights.
TEST(SoftmaxMerge, AnySplitGivesTheWhole) {
  check_random_splits<float>(8);
  check_random_splits<double>(8);
}

TEST(SoftmaxMerge, PartsWithoutKeysAreNeutral) {
  const SoftmaxState<float> none, some{3, 2};
  EXPECT_EQ(lse(none), -kInfinity<float>);
  EXPECT_EQ(lse(merge(none, none)), -kInfinity<float>);
  EXPECT_EQ(merge(none, some).m, 3);
  EXPECT_EQ(merge(none, some).l, 2);
  EXPECT_EQ(merge(some, none).l, 2);
  const MergedLse<float> merged = merge_lse(-kInfinity<float>, 1.5f);
  EXPECT_EQ(merged.lse, 1.5f);
  EXPECT_EQ(merged.a, 0);
  EXPECT_EQ(merged.b, 1);
}

TEST(SoftmaxMerge, InfiniteScoresTakeAllAndNanStaysNan) {
  const float inf = kInfinity<float>, nan = std::numeric_limits<float>::quiet_NaN();
  const SoftmaxState<float> infinite{inf, 1}, some{3, 2};
  EXPECT_EQ(merge(infinite, some).l, 1);
  EXPECT_EQ(merge(some, infinite).l, 1);
  EXPECT_EQ(merge(infinite, infinite).l, 2);
  EXPECT_EQ(lse(infinite), inf);
  EXPECT_EQ(merge_lse(inf, 3.0f).a, 1);
  EXPECT_EQ(merge_lse(inf, 3.0f).b, 0);
  EXPECT_EQ(merge_lse(inf, inf).a, 0.5f);
  EXPECT_EQ(merge_lse(inf, -inf).a, 1);
  for (float other : {-inf, 0.0f, inf}) {
    EXPECT_TRUE(std::isnan(merge_lse(nan, other).lse)) << other;
    EXPECT_TRUE(std::isnan(merge_lse(other, nan).lse)) << other;
    EXPECT_TRUE(std::isnan(lse(merge(SoftmaxState<float>{nan, 1}, SoftmaxState<float>{other, 1})))) << other;
    EXPECT_TRUE(std::isnan(lse(merge(SoftmaxState<float>{other, 1}, SoftmaxState<float>{nan, 1})))) << other;
  }
}

TEST(SoftmaxMerge, ScoresFarApartDoNotOverflow) {
  EXPECT_EQ(merge_lse(1e30, -1e30).a, 1);
  EXPECT_EQ(merge_lse(-1e30f, 1e30f).b, 1);
  EXPECT_EQ(merge_lse(1e38f, 1e38f).a, 0.5f);
  EXPECT_EQ(merge(SoftmaxState<float>{-3e38f, 1}, SoftmaxState<float>{3e38f, 1}).l, 1);
}

TEST(SoftmaxMerge, SinkOnlyEntersTheDenominator) {
  const double total = lse(merge(SoftmaxState<double>{1, 1}, SoftmaxState<double>{2, 1}));
  const double factor = sink_factor(total, 0.5);
  EXPECT_NEAR(std::exp(1 - total) * factor, 0.2312239, 5e-8);
  EXPECT_NEAR(std::exp(2 - total) * factor, 0.6285317, 5e-8);
  EXPECT_EQ(sink_factor(1.0f, -kInfinity<float>), 1);
  EXPECT_EQ(sink_factor(1.0f, kInfinity<float>), 0);
  EXPECT_EQ(sink_factor(-kInfinity<float>, 0.0f), 0);
  EXPECT_EQ(sink_factor(-kInfinity<float>, -kInfinity<float>), 0);
  EXPECT_EQ(sink_factor(-1e30f, 1e30f), 0);
}

}  // namespace
}  // namespace dsm
