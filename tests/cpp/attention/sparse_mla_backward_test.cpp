// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "dsm/sparse_mla.h"

namespace dsm {
namespace {

TEST(SparseMlaBackward, EqualScores) {
  // q = 0, so a query that lists n keys gives each the probability 1 / n, half of that under a sink of log n; its ds
  // are p (dout · v − dout · out). The first query lists rows 0 and 1, the second row 1 twice, the third nothing.
  const double q[] = {0, 0, 0}, kv[] = {2, 6, 1e9}, dout[] = {1, 3, 5}, sink[] = {std::log(2.0)};
  const std::int32_t indices[] = {0, 1, 1, 1, -1, 3};
  const double infinity = std::numeric_limits<double>::infinity(), lse[] = {sink[0], sink[0], infinity};
  const double out[] = {2, 3, 0};
  std::vector<double> dq(3, NAN), dkv(3, NAN), dattn_sink(1, NAN);
  sparse_mla_backward({.dout = {dout, DType::float64, {3, 1, 1}},
                       .q = {q, DType::float64, {3, 1, 1}},
                       .kv = {kv, DType::float64, {3, 1, 1}},
                       .indices = {indices, DType::int32, {3, 1, 2}},
                       .attn_sink = {sink, DType::float64, {1}},
                       .out = {out, DType::float64, {3, 1, 1}},
                       .lse = {lse, DType::float64, {3, 1}},
                       .softmax_scale = 0.5,
                       .dq = {dq.data(), DType::float64, {3, 1, 1}},
                       .dkv = {dkv.data(), DType::float64, {3, 1, 1}},
                       .dattn_sink = {dattn_sink.data(), DType::float64, {1}}});
  // dq = scale Σ p dout (v − out) k: ½ · ¼ · (0 · 2 + 4 · 6), and ½ · ¼ · 3 · 2 · (3 · 6).
  EXPECT_NEAR(dq[0], 3, 1e-14);
  EXPECT_NEAR(dq[1], 13.5, 1e-14);
  EXPECT_EQ(dq[2], 0);
  EXPECT_NEAR(dkv[0], 0.25, 1e-15);
  EXPECT_NEAR(dkv[1], 0.25 + 2 * 0.25 * 3, 1e-15);
  EXPECT_EQ(dkv[2], 0);
  EXPECT_NEAR(dattn_sink[0], -0.5 * (1 * 2 + 3 * 3), 1e-14);
}

TEST(SparseMlaBackward, WithoutQueriesTheGradientsAreZero) {
  const float kv[] = {1, 2};
  float dkv[] = {NAN, NAN}, dattn_sink[] = {NAN}, sink[] = {1};
  sparse_mla_backward({.dout = {nullptr, DType::float32, {0, 1, 1}},
                       .q = {nullptr, DType::float32, {0, 1, 1}},
                       .kv = {kv, DType::float32, {2, 1, 1}},
                       .indices = {nullptr, DType::int32, {0, 1, 4}},
                       .attn_sink = {sink, DType::float32, {1}},
                       .out = {nullptr, DType::float32, {0, 1, 1}},
                       .lse = {nullptr, DType::float32, {0, 1}},
                       .dq = {nullptr, DType::float32, {0, 1, 1}},
                       .dkv = {dkv, DType::float32, {2, 1, 1}},
                       .dattn_sink = {dattn_sink, DType::float32, {1}}});
  EXPECT_EQ(dkv[0], 0);
  EXPECT_EQ(dkv[1], 0);
  EXPECT_EQ(dattn_sink[0], 0);
}

}  // namespace
}  // namespace dsm
