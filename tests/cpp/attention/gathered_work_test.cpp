// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include "src/attention/gathered_cuda.h"

namespace dsm::attention {
namespace {

GatheredWork work(std::int64_t requests, std::int64_t units_of_request, std::int64_t rows, std::int64_t keys) {
  return {.requests = requests,
          .units = requests * units_of_request,
          .rows = rows,
          .keys = keys,
          .d_v = 512,
          .dtype = DType::bfloat16,
          .batch_invariant = true};
}

TEST(GatheredWork, InvariantSplitsFollowOneRequest) {
  for (const std::int64_t units : {1, 2, 100, 4096}) {
    for (const std::int64_t rows : {1, 16, 128, 5000}) {
      const int splits = work(1, units, rows, 64).splits();
      EXPECT_GE(splits, 1);
      for (const std::int64_t requests : {2, 7, 512}) {
        EXPECT_EQ(work(requests, units, rows, 64).splits(), splits);
        EXPECT_EQ(work(requests, units, rows, 1 << 20).splits(), splits);
      }
    }
  }
  EXPECT_GT(work(1, 1, 128, 64).splits(), 1);
}

TEST(GatheredWork, InvariantPromptsTakeNoMemory) {
  EXPECT_EQ(work(1, 4096, 128, 2048).workspace_bytes(), 0u);
  EXPECT_EQ(work(3, 1, 4096 * 128, 100'000).workspace_bytes(), 0u);
}

TEST(GatheredWork, GroupsComeBeforeSplits) {
  GatheredWork decode = work(128, 1, 16, 2048);
  decode.batch_invariant = false, decode.grouped = true;
  EXPECT_EQ(decode.plan().splits, 1);
  EXPECT_EQ(decode.plan().groups, kFewBlocks);
  EXPECT_EQ(decode.workspace_bytes(), 0u);
  decode.units = decode.requests = 4096;  // they fill the processors by themselves
  EXPECT_EQ(decode.plan().splits, 1);
  EXPECT_EQ(decode.plan().groups, 1);
  decode.units = decode.requests = 128, decode.grouped = false;
  EXPECT_GT(decode.plan().splits, 1);
  EXPECT_EQ(decode.plan().groups, 1);
}

TEST(GatheredWork, WithoutRequests) { EXPECT_EQ(work(0, 1, 16, 64).workspace_bytes(), 0u); }

}  // namespace
}  // namespace dsm::attention
