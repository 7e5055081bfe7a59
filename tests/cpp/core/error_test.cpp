// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/error.h"

#include <gtest/gtest.h>

#include "src/core/checks.h"

namespace dsm {
namespace {

TEST(Error, NamesOperatorArgumentExpectationAndArrival) {
  const float data[6] = {};
  const TensorView x(data, DType::float32, {2, 3});
  try {
    Check("rms_norm").tensor("weight", x, "[hidden]", {3}, {DType::bfloat16, DType::float32});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "rms_norm: weight must be [hidden] = [3] bfloat16|float32, got [2, 3] float32 on cpu");
    EXPECT_EQ(error.operation(), "rms_norm");
    EXPECT_EQ(error.argument(), "weight");
  }
}

TEST(Error, AbsentTensorIsNothing) {
  EXPECT_THROW(Check("op").tensor("x", TensorView(), "[n]", {Check::kAny}, kFloating), Error);
  EXPECT_EQ(describe(TensorView()), "nothing");
}

}  // namespace
}  // namespace dsm
