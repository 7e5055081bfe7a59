// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <vector>

#include "dsm/hyper_connection.h"

namespace dsm {
namespace {

TEST(HcPost, WritesBackAndMixesAlongColumns) {
  std::vector<float> y{100}, x{1, 10}, post{0, 1}, comb{1, 2, 3, 4}, out{-1, -1};
  hc_post({.y = {y.data(), DType::float32, {1, 1}},
           .x = {x.data(), DType::float32, {1, 2, 1}},
           .post = {post.data(), DType::float32, {1, 2}},
           .comb = {comb.data(), DType::float32, {1, 2, 2}},
           .out = {out.data(), DType::float32, {1, 2, 1}}});
  EXPECT_EQ(out, (std::vector<float>{31, 142}));
}

TEST(HcPost, NoTokensIsNothingToDo) {
  hc_post({.y = {nullptr, DType::bfloat16, {0, 8}},
           .x = {nullptr, DType::bfloat16, {0, 4, 8}},
           .post = {nullptr, DType::float32, {0, 4}},
           .comb = {nullptr, DType::float32, {0, 4, 4}},
           .out = {nullptr, DType::bfloat16, {0, 4, 8}}});
}

}  // namespace
}  // namespace dsm
