// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "dsm/error.h"
#include "dsm/kv_cache.h"

namespace dsm {
namespace {

constexpr std::int64_t kTokens = 5, kRows = 3;

// Token t is the row (t, 10 t + 1, 10 t + 2), stored in a plain cache of 3 pages of one row.
struct KvInsert : testing::Test {
  std::vector<double> latent, k_pe;
  std::vector<double> cache = std::vector<double>(kRows * 3, -1);
  std::vector<std::int64_t> slots{2, 0, -1, 2, std::numeric_limits<std::int64_t>::max()};

  KvInsert() {
    for (int t = 0; t < kTokens; ++t) {
      latent.push_back(t);
      k_pe.insert(k_pe.end(), {10.0 * t + 1, 10.0 * t + 2});
    }
  }

  TensorView cache_view() const { return {cache.data(), DType::float64, {kRows, 1, 1, 3}}; }
  MlaKvInsertArgs args() const {
    return {.latent = {latent.data(), DType::float64, {kTokens, 1}},
            .k_pe = {k_pe.data(), DType::float64, {kTokens, 2}},
            .slots = {slots.data(), DType::int64, {kTokens}},
            .cache = cache_view()};
  }
};

TEST_F(KvInsert, TheLastTokenOfASlotIsStoredAndOthersArePassedOver) {
  mla_kv_insert(args());
  EXPECT_EQ(cache, (std::vector<double>{1, 11, 12, -1, -1, -1, 3, 31, 32}));
}

TEST_F(KvInsert, GatherReadsThemBack) {
  mla_kv_insert(args());
  const std::vector<std::int32_t> indices{2, -1, 0, std::numeric_limits<std::int32_t>::min(), 3};
  std::vector<float> out(indices.size() * 3, -1);
  kv_gather({.cache = cache_view(),
             .indices = {indices.data(), DType::int32, {5}},
             .out = {out.data(), DType::float32, {5, 3}}});
  EXPECT_EQ(out, (std::vector<float>{3, 31, 32, 0, 0, 0, 1, 11, 12, 0, 0, 0, 0, 0, 0}));
}

TEST_F(KvInsert, GatherWithoutIndicesReadsEveryRow) {
  mla_kv_insert(args());
  std::vector<double> out(kRows * 3, 7);
  const KvGatherArgs every{.cache = cache_view(), .out = {out.data(), DType::float64, {kRows, 3}}};
  kv_gather(every);
  EXPECT_EQ(out, cache);
  KvGatherArgs fewer = every;
  fewer.out.shape[0] = kRows - 1;
  EXPECT_THROW(kv_gather(fewer), Error);
}

TEST_F(KvInsert, RefusesRowsOfAnotherWidthBeforeItWrites) {
  MlaKvInsertArgs a = args();
  a.k_pe = {k_pe.data(), DType::float64, {kTokens, 1}};
  EXPECT_THROW(mla_kv_insert(a), Error);
  EXPECT_EQ(cache, std::vector<double>(kRows * 3, -1));
}

TEST(V4KvInsert, NormalisesThenTurns) {
  // Mean square 25: the row becomes (1, 2) and, a quarter turn later, (-2, 1).
  const std::vector<double> kv{5, 5}, weight{1, 2};
  const std::vector<std::int64_t> slots{0}, positions{1};
  const std::vector<float> inv_freq{1.57079632679f};
  std::vector<double> cache(2);
  v4_kv_insert({.kv = {kv.data(), DType::float64, {1, 2}},
                .weight = {weight.data(), DType::float64, {2}},
                .eps = 0,
                .positions = {positions.data(), DType::int64, {1}},
                .inv_freq = {inv_freq.data(), DType::float32, {1}},
                .slots = {slots.data(), DType::int64, {1}},
                .cache = {cache.data(), DType::float64, {1, 1, 1, 2}}});
  EXPECT_NEAR(cache[0], -2, 1e-6);
  EXPECT_NEAR(cache[1], 1, 1e-6);
}

TEST(KvFormat, IsNamedByItsBytes) {
  const std::uint8_t byte = 0;
  for (KvFormat format : kKvFormats) {
    EXPECT_EQ(kv_format({&byte, DType::uint8, {0, 1, 1, kv_bytes(format)}}), format);
    EXPECT_EQ(kv_width({&byte, DType::int8, {0, 1, 1, kv_bytes(format)}}), kv_width(format));
    EXPECT_EQ(kv_width({&byte, DType::bfloat16, {0, 1, 1, kv_bytes(format)}}), kv_bytes(format));
  }
  EXPECT_FALSE(kv_format({&byte, DType::uint8, {0, 1, 1, 132}}));
}

}  // namespace
}  // namespace dsm
