// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "dsm/error.h"
#include "dsm/quant.h"

namespace dsm {
namespace {

using Bytes = std::vector<std::uint8_t>;

TEST(Fp8Quantize, PartialBlocksHaveTheirOwnScale) {
  const std::vector<float> x{448, 1, 3, 0, -896, 0};  // [1, 2, 3] in blocks of 2 x 2
  Bytes data(6), scales(2);
  fp8_quantize({.x = {x.data(), DType::float32, {1, 2, 3}},
                .block_rows = 2,
                .block_columns = 2,
                .data = {data.data(), DType::float8_e4m3fn, {1, 2, 3}},
                .scales = {scales.data(), DType::float8_e8m0fnu, {1, 1, 2}}});
  EXPECT_EQ(scales, (Bytes{128, 120}));  // 896 / 448 = 2; 3 / 448 up to 2^-7
  // 224, 0.5, 3 · 2^7 = 384, 0, -448, 0.
  EXPECT_EQ(data, (Bytes{0x76, 0x30, 0x7c, 0x00, 0xfe, 0x00}));
}

TEST(Fp8Quantize, RefusesBeforeWriting) {
  const std::vector<float> x(4, 1);
  Bytes data(4, 9), scales(2, 9);
  Fp8QuantizeArgs args{.x = {x.data(), DType::float32, {1, 1, 4}},
                       .block_columns = 2,
                       .data = {data.data(), DType::float8_e4m3fn, {1, 1, 4}},
                       .scales = {scales.data(), DType::float8_e8m0fnu, {1, 1, 1}}};
  EXPECT_THROW(fp8_quantize(args), Error);
  args.block_columns = INT64_MIN;
  EXPECT_THROW(fp8_quantize(args), Error);
  EXPECT_EQ(data, Bytes(4, 9));
  EXPECT_EQ(scales, Bytes(2, 9));
  args.block_columns = INT64_MAX;
  fp8_quantize(args);
  EXPECT_EQ(scales, (Bytes{119, 9}));
}

TEST(Nvfp4Quantize, LowNibbleIsTheEvenElement) {
  std::vector<float> x(16, 0);
  x[0] = 6;
  x[1] = -1;
  x[15] = 3;
  Bytes packed(8), scales(1);
  float global_scale = 0;
  const Nvfp4QuantizeArgs args{.x = {x.data(), DType::float32, {1, 1, 16}},
                               .packed = {packed.data(), DType::uint8, {1, 1, 8}},
                               .scales = {scales.data(), DType::float8_e4m3fn, {1, 1, 1}},
                               .global_scale = {&global_scale, DType::float32, {1}}};
  nvfp4_quantize(args);
  EXPECT_EQ(global_scale, 6.0f / 2688.0f);
  EXPECT_EQ(scales, (Bytes{0x7e}));
  EXPECT_EQ(packed, (Bytes{0xa7, 0, 0, 0, 0, 0, 0, 0x50}));
}

TEST(Mxfp4Quantize, RulesDifferWhereValuesSaturate) {
  std::vector<float> x(32, 7);
  Bytes packed(16), scales(1);
  Mxfp4QuantizeArgs args{.x = {x.data(), DType::float32, {1, 1, 32}},
                         .packed = {packed.data(), DType::uint8, {1, 1, 16}},
                         .scales = {scales.data(), DType::float8_e8m0fnu, {1, 1, 1}}};
  mxfp4_quantize(args);
  EXPECT_EQ(scales, Bytes{128});
  EXPECT_EQ(packed, Bytes(16, 0x66));
  args.rule = MxRule::ocp;
  mxfp4_quantize(args);
  EXPECT_EQ(scales, Bytes{127});
  EXPECT_EQ(packed, Bytes(16, 0x77));
}

TEST(Mxfp4ToFp8, SaysWhichBlocksAreExact) {
  const Bytes packed(4 * 16, 0x11);  // [1, 2, 64], all 0.5
  const Bytes group_scales{127, 112, 127, 113};
  Bytes data(2 * 64), scales(2);
  bool exact[2] = {true, false};
  mxfp4_to_fp8({.packed = {packed.data(), DType::uint8, {1, 2, 32}},
                .group_scales = {group_scales.data(), DType::float8_e8m0fnu, {1, 2, 2}},
                .block_rows = 1,
                .block_columns = 64,
                .data = {data.data(), DType::float8_e4m3fn, {1, 2, 64}},
                .scales = {scales.data(), DType::float8_e8m0fnu, {1, 2, 1}},
                .exact = {exact, DType::boolean, {1, 2, 1}}});
  EXPECT_EQ(scales, (Bytes{121, 121}));
  EXPECT_FALSE(exact[0]);  // 2^15 apart
  EXPECT_TRUE(exact[1]);
  EXPECT_EQ(data[0], 0x60);
  EXPECT_EQ(data[64 + 32], 0x01);
}

}  // namespace
}  // namespace dsm
