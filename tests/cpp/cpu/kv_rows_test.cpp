// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/kv_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace dsm::cpu {
namespace {

constexpr std::uint8_t kNanByte = 0xff;
constexpr int kPages = 3, kPageSize = 5, kPadding = 24;

// Codes of e4m3: 1, -2, 448, the smallest number; of e8m0: 2^-3 and 2^4; of bfloat16: 1.5 and -2.
constexpr std::uint8_t kOne = 0x38, kMinusTwo = 0xc0, kMost = 0x7e, kLeast = 0x01, kEighth = 124, kSixteen = 131;
constexpr std::uint8_t kBf16OneHalf[] = {0xc0, 0x3f}, kBf16MinusTwo[] = {0x00, 0xc0};

/// Pages of a format whose every byte is NaN, some padding apart.
class Pages {
 public:
  explicit Pages(KvFormat format) : format_(format), bytes_(kPages * stride(), kNanByte) {}

  std::int64_t stride() const { return kPageSize * kv_bytes(format_) + kPadding; }
  TensorView view() {
    TensorView v(bytes_.data(), DType::uint8, {kPages, kPageSize, 1, kv_bytes(format_)});
    v.stride[0] = stride();
    return v;
  }
  std::uint8_t* page(int i) { return bytes_.data() + i * stride(); }

  /// The bytes that a write changed, counted from the page's begin; nothing may have changed outside of the page.
  std::vector<std::int64_t> changed(int page) const {
    std::vector<std::int64_t> places;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(bytes_.size()); ++i)
      if (bytes_[i] != kNanByte) places.push_back(i - page * stride());
    return places;
  }

 private:
  KvFormat format_;
  std::vector<std::uint8_t> bytes_;
};

std::vector<float> read(const TensorView& cache, std::int64_t index) {
  const KvRows rows(cache);
  std::vector<float> row(rows.width());
  rows.read(index, row.data());
  std::vector<double> wide(rows.width());
  rows.read(index, wide.data());
  EXPECT_TRUE(std::equal(row.begin(), row.end(), wide.begin(), [](float a, double b) {
    return a == static_cast<float>(b) || (std::isnan(a) && std::isnan(b));
  }));
  return row;
}

// Entry 2 of page 1 is written byte by byte, at places taken from the description of the format.
constexpr int kPage = 1, kEntry = 2, kIndex = kPage * kPageSize + kEntry;

TEST(KvRows, ReadsV32Fp8) {
  Pages pages(KvFormat::v32_fp8);
  std::uint8_t* row = pages.page(kPage) + kEntry * 656;
  std::fill_n(row, 512, std::uint8_t{0});
  row[0] = kOne, row[127] = kMinusTwo, row[128] = kMost, row[511] = kLeast;
  const float scales[] = {0.3f, 1, 1, 4};
  std::copy_n(reinterpret_cast<const std::uint8_t*>(scales), 16, row + 512);
  for (int i = 0; i < 64; ++i) std::copy_n(i == 63 ? kBf16MinusTwo : kBf16OneHalf, 2, row + 528 + 2 * i);
  const auto values = read(pages.view(), kIndex);
  EXPECT_EQ(values[0], 0.3f);
  EXPECT_EQ(values[127], -0.6f);
  EXPECT_EQ(values[128], 448);
  EXPECT_EQ(values[511], 0x1p-7f);
  EXPECT_EQ(values[512], 1.5f);
  EXPECT_EQ(values[575], -2);
  EXPECT_TRUE(std::isnan(read(pages.view(), kIndex - 1)[0]));
}

TEST(KvRows, ReadsV32Nvfp4) {
  Pages pages(KvFormat::v32_nvfp4);
  std::uint8_t* row = pages.page(kPage) + kEntry * 352;
  std::fill_n(row, 256, std::uint8_t{0});
  row[0] = 0xf7, row[255] = 0x91;  // 6, -6; 0.5, -0.5
  std::fill_n(row + 256, 64, kOne);
  row[319] = kMinusTwo;
  std::fill_n(row + 320, 32, kOne);
  row[351] = kMost;
  const auto values = read(pages.view(), kIndex);
  EXPECT_EQ(values[0], 6);
  EXPECT_EQ(values[1], -6);
  EXPECT_EQ(values[510], 224);
  EXPECT_EQ(values[511], -224);
  EXPECT_EQ(values[512], 1);
  EXPECT_EQ(values[575], -2);
}

TEST(KvRows, ReadsV4Fp8WithScalesAtThePagesEnd) {
  Pages pages(KvFormat::v4_fp8);
  std::uint8_t* row = pages.page(kPage) + kEntry * 576;
  std::fill_n(row, 448, std::uint8_t{0});
  row[0] = kOne, row[63] = kMinusTwo, row[64] = kOne, row[447] = kMost;
  for (int i = 0; i < 64; ++i) std::copy_n(i == 63 ? kBf16MinusTwo : kBf16OneHalf, 2, row + 448 + 2 * i);
  std::uint8_t* scales = pages.page(kPage) + kPageSize * 576 + kEntry * 8;
  std::fill_n(scales, 7, std::uint8_t{127});
  scales[0] = kEighth, scales[6] = kSixteen;
  const auto values = read(pages.view(), kIndex);
  EXPECT_EQ(values[0], 0.125f);
  EXPECT_EQ(values[63], -0.25f);
  EXPECT_EQ(values[64], 1);
  EXPECT_EQ(values[447], 448 * 16);
  EXPECT_EQ(values[448], 1.5f);
  EXPECT_EQ(values[511], -2);
}

TEST(KvRows, ReadsV41Fp8) {
  Pages pages(KvFormat::v41_fp8);
  std::uint8_t* row = pages.page(kPage) + kEntry * 528;
  std::fill_n(row, 512, kOne);
  row[511] = kMinusTwo;
  std::fill_n(row + 512, 16, kEighth);
  row[527] = kSixteen;
  const auto values = read(pages.view(), kIndex);
  EXPECT_EQ(values[0], 0.125f);
  EXPECT_EQ(values[479], 0.125f);
  EXPECT_EQ(values[480], 16);
  EXPECT_EQ(values[511], -32);
}

TEST(KvRows, ReadsV41Fp4) {
  Pages pages(KvFormat::v41_fp4);
  std::uint8_t* row = pages.page(kPage) + kEntry * 288;
  std::fill_n(row, 256, std::uint8_t{0x42});  // 1, 2
  row[255] = 0xd3;                            // 1.5, -3
  std::fill_n(row + 256, 32, kOne);
  row[287] = kMinusTwo;
  const auto values = read(pages.view(), kIndex);
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], 2);
  EXPECT_EQ(values[510], -3);
  EXPECT_EQ(values[511], 6);
}

TEST(KvRows, WritesItsOwnRowAndNothingElse) {
  for (KvFormat format : kKvFormats) {
    Pages pages(format);
    const KvRows rows(pages.view());
    const std::vector<float> values(rows.width(), 0.75f);
    rows.write(kIndex, values.data());
    EXPECT_EQ(read(pages.view(), kIndex), values);
    std::vector<std::int64_t> expected;
    if (format == KvFormat::v4_fp8) {
      for (int i = 0; i < 576; ++i) expected.push_back(kEntry * 576 + i);
      for (int i = 0; i < 8; ++i) expected.push_back(kPageSize * 576 + kEntry * 8 + i);
    } else {
      for (int i = 0; i < kv_bytes(format); ++i) expected.push_back(kEntry * kv_bytes(format) + i);
    }
    EXPECT_EQ(pages.changed(kPage), expected) << kv_bytes(format);
  }
}

TEST(KvRows, NanStaysInItsGroup) {
  for (KvFormat format : kKvFormats) {
    Pages pages(format);
    const KvRows rows(pages.view());
    std::vector<float> values(rows.width(), 1.5f);
    values[3] = std::nanf("");
    values[200] = -std::numeric_limits<float>::infinity();
    rows.write(kIndex, values.data());
    const auto again = read(pages.view(), kIndex);
    EXPECT_TRUE(std::isnan(again[3]) && std::isnan(again[200])) << kv_bytes(format);
    EXPECT_EQ(std::count(again.begin() + 256, again.end(), 1.5f), rows.width() - 256) << kv_bytes(format);
  }
}

TEST(KvRows, PlainRowsOfEveryType) {
  for (DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    std::vector<double> storage(4 * 3 * 40);  // large enough for all
    TensorView cache(storage.data(), dtype, {4, 3, 1, 37});
    cache.stride[0] = 3 * 37 + 5;
    const KvRows rows(cache);
    EXPECT_EQ(rows.rows(), 12);
    EXPECT_EQ(rows.width(), 37);
    for (int row = 0; row < 12; ++row) {
      std::vector<float> values(37);
      for (int i = 0; i < 37; ++i) values[i] = static_cast<float>(row - i) / 4;
      rows.write(row, values.data());
    }
    for (int row = 0; row < 12; ++row) EXPECT_EQ(read(cache, row)[36], static_cast<float>(row - 36) / 4);
  }
}

TEST(KvRows, OnlyRowsOfTheCacheAreValid) {
  Pages pages(KvFormat::v41_fp8);
  const KvRows rows(pages.view());
  EXPECT_TRUE(rows.valid(0) && rows.valid(14));
  EXPECT_FALSE(rows.valid(-1) || rows.valid(15) || rows.valid(std::int64_t{1} << 40));
}

}  // namespace
}  // namespace dsm::cpu
