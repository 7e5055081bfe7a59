// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "dsm/error.h"
#include "dsm/kv_cache.h"

namespace dsm {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Ratio 2 with overlap and one dimension: channel 0 is pooled by the next entry, channel 1 by a token's own.
struct KvCompress : testing::Test {
  std::vector<double> a{1, 10, 2, 20, 4, 40, 8, 80, 16, 160};
  std::vector<double> z = std::vector<double>(10);
  std::vector<double> ape{0, 0, 0, std::log(3.0)};
  std::vector<std::int32_t> ends{0, 5};
  std::vector<double> c{kNan, kNan, kNan};
  std::vector<std::int32_t> tokens{9, 9, 9};
  const std::vector<double> expected{(10 + 3 * 20) / 4.0, (1 + 2 + 40 + 3 * 80) / 6.0};

  KvCompressArgs args(std::int64_t first, std::int64_t count, std::int64_t entries) {
    ends[1] = static_cast<std::int32_t>(count);
    return {.a = {a.data() + 2 * first, DType::float64, {count, 2}},
            .z = {z.data() + 2 * first, DType::float64, {count, 2}},
            .ape = {ape.data(), DType::float64, {2, 2}},
            .cu_seqlens = {ends.data(), DType::int32, {2}},
            .overlap = true,
            .c = {c.data(), DType::float64, {entries, 1}},
            .tokens = {tokens.data(), DType::int32, {entries}}};
  }
};

TEST_F(KvCompress, WholeSequence) {
  kv_compress(args(0, 5, 2));
  EXPECT_NEAR(c[0], expected[0], 1e-14);
  EXPECT_NEAR(c[1], expected[1], 1e-14);
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{1, 3, 9}));
}

TEST_F(KvCompress, TokenByTokenThroughARing) {
  std::vector<double> state(4 * 4, kNan);
  const std::vector<std::int32_t> table{3, 1, 0, 2};
  for (std::int64_t position = 0; position < 5; ++position) {
    KvCompressArgs a = args(position, 1, 1);
    a.start_positions = {&position, DType::int64, {1}};
    a.state = {state.data(), DType::float64, {4, 1, 4}};
    a.block_table = {table.data(), DType::int32, {1, 4}};
    kv_compress(a);
    if (position % 2 == 1) EXPECT_NEAR(c[0], expected[position / 2], 1e-14);
    EXPECT_EQ(tokens[0], position % 2 == 1 ? 0 : -1);
  }
}

TEST_F(KvCompress, RefusesARingThatIsTooSmall) {
  std::vector<double> state(3 * 4);
  const std::vector<std::int32_t> table{0, 1, 2};
  const std::int64_t start = 0;
  KvCompressArgs a = args(0, 1, 1);
  a.start_positions = {&start, DType::int64, {1}};
  a.state = {state.data(), DType::float64, {3, 1, 4}};
  a.block_table = {table.data(), DType::int32, {1, 3}};
  EXPECT_THROW(kv_compress(a), Error);
}

TEST(KvCompressEntries, AreAsManyAsCanBeCompleted) {
  EXPECT_EQ(kv_compress_entries(11, 3, 4, true), 2);
  EXPECT_EQ(kv_compress_entries(11, 3, 4, false), 5);
  EXPECT_EQ(kv_compress_entries(2, 3, 4, false), 2);
}

}  // namespace
}  // namespace dsm
