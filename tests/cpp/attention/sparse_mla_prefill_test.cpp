// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "dsm/error.h"
#include "dsm/sparse_mla.h"

namespace dsm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::int32_t kSmallest = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kLargest = std::numeric_limits<std::int32_t>::max();

TEST(SparseMlaPrefill, EqualScoresGiveTheMeanOfTheListedRows) {
  // q = 0. Of the three queries the second lists row 1 twice and the third nothing.
  const float q[] = {0, 0, 0, 0, 0, 0}, kv[] = {4, kNaN, 8, 1, 6, 2};
  const float kv_clean[] = {4, 3, 8, 1, 6, 2};
  const std::int32_t indices[] = {0, 2, -1, kSmallest, 1, 1, 2, kLargest, -1, 3, kSmallest, kLargest};
  float out[3] = {kNaN, kNaN, kNaN}, max_logits[3], lse[3], probs[12];
  sparse_mla_prefill({.q = {q, DType::float32, {3, 1, 2}},
                      .kv = {kv_clean, DType::float32, {3, 1, 2}},
                      .indices = {indices, DType::int32, {3, 1, 4}},
                      .out = {out, DType::float32, {3, 1, 1}},
                      .max_logits = {max_logits, DType::float32, {3, 1}},
                      .lse = {lse, DType::float32, {3, 1}},
                      .key_probs = {probs, DType::float32, {3, 1, 4}}});
  EXPECT_FLOAT_EQ(out[0], 5);
  EXPECT_FLOAT_EQ(out[1], 22.f / 3);
  EXPECT_EQ(out[2], 0);
  EXPECT_FLOAT_EQ(lse[0], std::log(2.f));
  EXPECT_FLOAT_EQ(lse[1], std::log(3.f));
  EXPECT_EQ(lse[2], kInfinity);
  EXPECT_EQ(max_logits[1], 0);
  EXPECT_EQ(max_logits[2], -kInfinity);
  const float third = 1.f / 3, expected[] = {.5f, .5f, 0, 0, third, third, third, 0, 0, 0, 0, 0};
  for (int i = 0; i < 12; ++i) EXPECT_FLOAT_EQ(probs[i], expected[i]);

  // Only the first index of each counts: the first query sees row 0, NaN in its key, the second row 1.
  const std::int32_t lengths[] = {1, 1, 1};
  sparse_mla_prefill({.q = {q, DType::float32, {3, 1, 2}},
                      .kv = {kv, DType::float32, {3, 1, 2}},
                      .indices = {indices, DType::int32, {3, 1, 4}},
                      .topk_length = {lengths, DType::int32, {3}},
                      .out = {out, DType::float32, {3, 1, 1}},
                      .max_logits = {max_logits, DType::float32, {3, 1}},
                      .lse = {lse, DType::float32, {3, 1}}});
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], 8);
  EXPECT_EQ(out[2], 0);
}

TEST(SparseMlaPrefill, TheSinkTakesItsShareOfTheOutputAlone) {
  const float q[] = {1, 1, 1}, kv[] = {5}, sink[] = {-kInfinity, 5, kInfinity};
  const std::int32_t indices[] = {0};
  float out[3], max_logits[3], lse[3];
  sparse_mla_prefill({.q = {q, DType::float32, {1, 3, 1}},
                      .kv = {kv, DType::float32, {1, 1, 1}},
                      .indices = {indices, DType::int32, {1, 1, 1}},
                      .attn_sink = {sink, DType::float32, {3}},
                      .out = {out, DType::float32, {1, 3, 1}},
                      .max_logits = {max_logits, DType::float32, {1, 3}},
                      .lse = {lse, DType::float32, {1, 3}}});
  EXPECT_EQ(out[0], 5);
  EXPECT_EQ(out[1], 2.5f);
  EXPECT_EQ(out[2], 0);
  for (float x : lse) EXPECT_EQ(x, 5);
}

TEST(SparseMlaPrefill, WithoutLargestScoresTheLogarithmsMayLieAnywhere) {
  const float q[] = {1, 2, 3, 4}, kv[] = {2, 5};  // two queries of two heads
  const std::int32_t indices[] = {0, 1};
  float out[4], lse[4] = {kNaN, kNaN, kNaN, kNaN};
  SparseMlaPrefillArgs args{.q = {q, DType::float32, {2, 2, 1}},
                            .kv = {kv, DType::float32, {2, 1, 1}},
                            .indices = {indices, DType::int32, {2, 1, 1}},
                            .out = {out, DType::float32, {2, 2, 1}},
                            .lse = {lse, DType::float32, {2, 2}}};
  args.lse.stride = {1, 2};
  sparse_mla_prefill(args);
  const float expected[] = {2, 15, 4, 20};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(lse[i], expected[i]);

  float max_logits[4];
  args.max_logits = {max_logits, DType::float32, {2, 2}};
  EXPECT_THROW(sparse_mla_prefill(args), Error);
}

TEST(SparseMlaPrefill, RefusesValuesWiderThanRows) {
  float x[8] = {7, 7, 7, 7, 7, 7, 7, 7};
  const std::int32_t indices[] = {0};
  EXPECT_THROW(sparse_mla_prefill({.q = {x, DType::float32, {1, 1, 2}},
                                   .kv = {x, DType::float32, {1, 1, 2}},
                                   .indices = {indices, DType::int32, {1, 1, 1}},
                                   .out = {x + 2, DType::float32, {1, 1, 3}},
                                   .max_logits = {x + 5, DType::float32, {1, 1}},
                                   .lse = {x + 6, DType::float32, {1, 1}}}),
               Error);
  for (float value : x) EXPECT_EQ(value, 7);
}

}  // namespace
}  // namespace dsm
