// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/indexer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dsm/error.h"

namespace dsm {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// A contiguous view of a vector.
template <class T>
TensorView view(const std::vector<T>& values, DType dtype, std::initializer_list<std::int64_t> shape) {
  return {values.data(), dtype, shape};
}

TEST(HadamardQuantize, OneElementPicksOutARowOfTheMatrix) {
  for (std::int64_t d : {1, 2, 8, 256}) {
    for (std::int64_t i : {std::int64_t{0}, d / 2, d - 1}) {
      std::vector<double> x(d), y(d);
      x[i] = std::sqrt(static_cast<double>(d));
      hadamard_quantize({.x = view(x, DType::float64, {1, d}), .y = view(y, DType::float64, {1, d})});
      for (std::int64_t j = 0; j < d; ++j)
        EXPECT_NEAR(y[j], __builtin_popcountll(i & j) % 2 ? -1 : 1, 1e-15) << d << " " << i << " " << j;
    }
  }
}

TEST(HadamardQuantize, Fp8NeedsAScaleAndOthersHaveNone) {
  std::vector<float> x(32), y(32), scale(1);
  HadamardQuantizeArgs args{
      .x = view(x, DType::float32, {1, 32}), .format = IndexerFormat::fp8, .y = view(y, DType::float8_e4m3fn, {1, 32})};
  EXPECT_THROW(hadamard_quantize(args), Error);
  args.scale = view(scale, DType::float32, {1});
  hadamard_quantize(args);
  EXPECT_EQ(scale[0], std::ldexp(1.0f, -22));
  args.format = IndexerFormat::fp4;
  args.y = view(y, DType::float32, {1, 32});
  EXPECT_THROW(hadamard_quantize(args), Error);
}

// 200 keys, more than a tile, of which the queries see [i, 200 - i).
TEST(IndexerLogits, MatchesTheFormula) {
  constexpr std::int64_t s_q = 3, s_kv = 200, heads = 2, d = 4;
  std::vector<float> q(s_q * heads * d), k(s_kv * d), weights{1, -2, 3, 0.5, -1, 1}, logits(s_q * s_kv, kNan);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(static_cast<int>(i * 7 % 11) - 5);
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>(static_cast<int>(i * 5 % 13) - 6);
  const std::vector<std::int32_t> starts{0, 1, 2}, ends{200, 199, 198};
  indexer_logits({.q = view(q, DType::float32, {s_q, heads, d}),
                  .k = view(k, DType::float32, {s_kv, d}),
                  .weights = view(weights, DType::float32, {s_q, heads}),
                  .starts = view(starts, DType::int32, {s_q}),
                  .ends = view(ends, DType::int32, {s_q}),
                  .logits = view(logits, DType::float32, {s_q, s_kv})});
  for (std::int64_t i = 0; i < s_q; ++i) {
    for (std::int64_t j = 0; j < s_kv; ++j) {
      float expected = 0;
      for (std::int64_t h = 0; h < heads; ++h) {
        float dot = 0;
        for (std::int64_t e = 0; e < d; ++e) dot += q[(i * heads + h) * d + e] * k[j * d + e];
        expected += weights[i * heads + h] * std::max(dot, 0.0f);
      }
      if (j < starts[i] || j >= ends[i]) expected = kNone;
      EXPECT_EQ(logits[i * s_kv + j], expected) << i << " " << j;
    }
  }
}

TEST(IndexerTopk, TiesGoToTheSmallerIndexAndNanIsNeverSelected) {
  const std::vector<float> logits{kNan, 1, 2, kNone, 2, 2, 1};
  std::vector<std::int32_t> indices(6);
  const auto select = [&](std::int64_t topk) {
    indices.assign(topk, 99);
    indexer_topk({.logits = view(logits, DType::float32, {1, 7}), .indices = view(indices, DType::int32, {1, topk})});
    return indices;
  };
  EXPECT_EQ(select(2), (std::vector<std::int32_t>{2, 4}));
  EXPECT_EQ(select(4), (std::vector<std::int32_t>{1, 2, 4, 5}));
  EXPECT_EQ(select(6), (std::vector<std::int32_t>{1, 2, 4, 5, 6, -1}));
}

TEST(IndexerKlLoss, UniformTargetOfTwoEqualLogitsIsZero) {
  const std::vector<double> logits{3, 3, -1}, target{5, 5};
  const std::vector<std::int32_t> indices{0, 1};
  std::vector<double> loss{9};
  indexer_kl_loss({.logits = view(logits, DType::float64, {1, 3}),
                   .target = view(target, DType::float64, {1, 2}),
                   .indices = view(indices, DType::int32, {1, 2}),
                   .loss = view(loss, DType::float64, {1})});
  EXPECT_NEAR(loss[0], 0, 1e-15);
}

}  // namespace
}  // namespace dsm
