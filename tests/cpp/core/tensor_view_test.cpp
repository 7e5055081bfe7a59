// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/tensor_view.h"

#include <gtest/gtest.h>

#include <string>

#include "dsm/dtype.h"

namespace dsm {
namespace {

TEST(TensorView, DefaultIsAbsent) {
  const TensorView absent;
  EXPECT_FALSE(absent);
  EXPECT_EQ(absent.numel(), 0);
}

TEST(TensorView, RowMajorStridesFromTheShape) {
  const float data[24] = {};
  const TensorView x(data, DType::float32, {2, 3, 4});
  EXPECT_TRUE(x);
  EXPECT_EQ(x.as<const float>(), data);
  EXPECT_EQ(x.rank, 3);
  EXPECT_EQ(x.stride[0], 12);
  EXPECT_EQ(x.stride[1], 4);
  EXPECT_EQ(x.stride[2], 1);
  EXPECT_EQ(x.numel(), 24);
  EXPECT_EQ(x.size(0), 2);
  EXPECT_EQ(x.size(-1), 4);
  EXPECT_EQ(x.size(-3), 2);
  EXPECT_TRUE(x.contiguous());
}

TEST(TensorView, ScalarHasOneElement) {
  const double data = 0;
  const TensorView x(&data, DType::float64, {});
  EXPECT_TRUE(x) << "a rank of zero is not absence";
  EXPECT_EQ(x.numel(), 1);
  EXPECT_TRUE(x.contiguous());
}

TEST(TensorView, ContiguityIgnoresStridesThatNobodyTakes) {
  TensorView x(nullptr, DType::int32, {4, 1, 8});
  x.stride[1] = -77;  // extent 1
  EXPECT_TRUE(x.contiguous());
  x.stride[0] = 9;
  EXPECT_FALSE(x.contiguous());
  x.shape[2] = 0;  // no element at all
  EXPECT_TRUE(x.contiguous());
  TensorView transposed(nullptr, DType::int32, {3, 2});
  transposed.stride = {1, 3};
  EXPECT_FALSE(transposed.contiguous());
}

TEST(TensorView, ElementCountsBeyondInt32) {
  const TensorView x(nullptr, DType::uint8, {1 << 20, 1 << 20});
  EXPECT_EQ(x.numel(), std::int64_t{1} << 40);
  EXPECT_EQ(x.stride[0], 1 << 20);
}

TEST(TensorView, DescriptionNamesShapeDtypeAndDevice) {
  EXPECT_EQ(describe({nullptr, DType::float16, {8, 64, 1, 512}, {DeviceType::cuda, 1}}),
            "[8, 64, 1, 512] float16 on cuda:1");
  EXPECT_EQ(describe({nullptr, DType::boolean, {}}), "[] bool on cpu");
  EXPECT_EQ(describe({}), "nothing");
}

TEST(DType, SizesAndTorchNames) {
  const struct {
    DType dtype;
    const char* name;
    int bytes;
  } rows[] = {{DType::float64, "float64", 8},
              {DType::float32, "float32", 4},
              {DType::float16, "float16", 2},
              {DType::bfloat16, "bfloat16", 2},
              {DType::float8_e4m3fn, "float8_e4m3fn", 1},
              {DType::float8_e5m2, "float8_e5m2", 1},
              {DType::float8_e8m0fnu, "float8_e8m0fnu", 1},
              {DType::uint8, "uint8", 1},
              {DType::int8, "int8", 1},
              {DType::int32, "int32", 4},
              {DType::int64, "int64", 8},
              {DType::boolean, "bool", 1}};
  for (const auto& row : rows) {
    EXPECT_STREQ(name(row.dtype), row.name);
    EXPECT_EQ(element_size(row.dtype), row.bytes) << row.name;
  }
}

}  // namespace
}  // namespace dsm
