// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "dsm/error.h"
#include "dsm/moe.h"

namespace dsm {
namespace {

// logits ln 1, ln 2, ln 4, ln 1 for every token: softmax scores 1/8, 1/4, 1/2, 1/8.
struct MoeGate : testing::Test {
  static constexpr std::int64_t kTokens = 3, kExperts = 4, kTopk = 2;
  std::vector<double> logits;
  std::vector<double> weights = std::vector<double>(kTokens * kTopk, -1);
  std::vector<std::int32_t> indices = std::vector<std::int32_t>(kTokens * kTopk, 99);

  MoeGate() {
    for (int t = 0; t < kTokens; ++t)
      for (double score : {1.0, 2.0, 4.0, 1.0}) logits.push_back(std::log(score));
  }

  MoeGateArgs args() {
    return {.logits = {logits.data(), DType::float64, {kTokens, kExperts}},
            .weights = {weights.data(), DType::float64, {kTokens, kTopk}},
            .indices = {indices.data(), DType::int32, {kTokens, kTopk}}};
  }

  void expect(const std::vector<std::int32_t>& experts, const std::vector<double>& values) {
    EXPECT_EQ(indices, experts);
    for (std::size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(weights[i], values[i], 1e-15) << "pair " << i;
  }
};

TEST_F(MoeGate, NormalisedOverTheSelected) {
  moe_gate(args());
  expect({2, 1, 2, 1, 2, 1}, {2. / 3, 1. / 3, 2. / 3, 1. / 3, 2. / 3, 1. / 3});
}

TEST_F(MoeGate, ScoresTimesFactor) {
  MoeGateArgs a = args();
  a.normalize = Normalize::none;
  a.routed_scaling_factor = 3;
  moe_gate(a);
  expect({2, 1, 2, 1, 2, 1}, {1.5, 0.75, 1.5, 0.75, 1.5, 0.75});
}

TEST_F(MoeGate, CapacityDropsLaterTokens) {
  MoeGateArgs a = args();
  a.capacity_rows = 2;
  moe_gate(a);
  expect({2, 1, 2, 1, -3, -2}, {2. / 3, 1. / 3, 2. / 3, 1. / 3, 0, 0});
}

TEST_F(MoeGate, NormalisedOverTheKept) {
  const std::vector<std::int64_t> ids{1, 0, 1};
  const std::vector<std::int32_t> table{1, 0, 2, 1};  // token id 0: experts 1, 0; 1: experts 2, 1
  MoeGateArgs a = args();
  a.token_ids = {ids.data(), DType::int64, {3}};
  a.tid2eid = {table.data(), DType::int32, {2, 2}};
  a.capacity_rows = 1;
  a.normalize = Normalize::kept;
  moe_gate(a);
  expect({2, 1, -2, 0, -3, -2}, {2. / 3, 1. / 3, 0, 1, 0, 0});
}

TEST_F(MoeGate, GroupsCountTheirBestTwo) {
  // Group {0, 1} is worth 3/8, group {2, 3} 5/8; the bias lifts the first above it.
  MoeGateArgs a = args();
  a.n_group = 2;
  moe_gate(a);
  EXPECT_EQ(indices, (std::vector<std::int32_t>{2, 3, 2, 3, 2, 3}));
  const std::vector<float> bias{0.5f, 0, 0, 0};
  a.bias = {bias.data(), DType::float32, {4}};
  moe_gate(a);
  expect({0, 1, 0, 1, 0, 1}, {1. / 3, 2. / 3, 1. / 3, 2. / 3, 1. / 3, 2. / 3});
}

TEST_F(MoeGate, SqrtSoftplusOfZero) {
  logits.assign(logits.size(), 0);
  MoeGateArgs a = args();
  a.scoring = Scoring::sqrtsoftplus;
  a.normalize = Normalize::none;
  moe_gate(a);
  const double score = std::sqrt(std::log(2.0));
  expect({0, 1, 0, 1, 0, 1}, std::vector<double>(6, score));
}

TEST_F(MoeGate, GradientOfASoftmaxScore) {
  MoeGateArgs a = args();
  moe_gate(a);
  const std::vector<double> dweights{1, 0, 0, 0, 0, 0};
  std::vector<double> dlogits(kTokens * kExperts, 99);
  MoeGateBackwardArgs b{.dweights = {dweights.data(), DType::float64, {kTokens, kTopk}},
                        .logits = a.logits,
                        .indices = a.indices,
                        .normalize = Normalize::none,
                        .dlogits = {dlogits.data(), DType::float64, {kTokens, kExperts}}};
  moe_gate_backward(b);
  const std::vector<double> of_score{-1. / 16, -1. / 8, 1. / 4, -1. / 16};  // s_2 (δ - s)
  for (int e = 0; e < 4; ++e) EXPECT_NEAR(dlogits[e], of_score[e], 1e-15);
  for (int i = 4; i < 12; ++i) EXPECT_EQ(dlogits[i], 0);
  b.normalize = Normalize::selected;  // weights 2/3 and 1/3 do not depend on the other experts
  moe_gate_backward(b);
  const std::vector<double> of_share{0, -2. / 9, 2. / 9, 0};
  for (int e = 0; e < 4; ++e) EXPECT_NEAR(dlogits[e], of_share[e], 1e-15);
}

TEST_F(MoeGate, NanIsRefusedBeforeAnythingIsWritten) {
  logits[6] = std::numeric_limits<double>::quiet_NaN();
  try {
    moe_gate(args());
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "moe_gate: logits must be below +inf, not NaN and not all -inf, got another value in row 1");
  }
  EXPECT_EQ(weights, std::vector<double>(6, -1));
  EXPECT_EQ(indices, std::vector<std::int32_t>(6, 99));
}

TEST_F(MoeGate, ATokensIdBeyondTheTableIsRefused) {
  const std::vector<std::int64_t> ids{1, 2, 1};
  const std::vector<std::int32_t> table{1, 0, 2, 1};
  MoeGateArgs a = args();
  a.token_ids = {ids.data(), DType::int64, {3}};
  a.tid2eid = {table.data(), DType::int32, {2, 2}};
  EXPECT_THROW(moe_gate(a), Error);
  EXPECT_EQ(indices, std::vector<std::int32_t>(6, 99));
}

}  // namespace
}  // namespace dsm
