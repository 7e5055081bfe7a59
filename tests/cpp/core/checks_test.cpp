// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/checks.h"

#include <gtest/gtest.h>

#include <string>

#include "dsm/error.h"

namespace dsm {
namespace {

const Check check("op");
alignas(16) char bytes[64];

/// The message of the dsm::Error that `body` throws; empty when it throws none.
template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

TensorView view(std::initializer_list<std::int64_t> shape, DType dtype = DType::float32) {
  return {bytes, dtype, shape};
}

TEST(Check, TensorLooksAtPresenceRankExtentsAndDtype) {
  const auto message = [](const TensorView& x) {
    return message_of(
        [&] { check.tensor("x", x, "[tokens, d]", {Check::kAny, 4}, {DType::float32, DType::bfloat16}); });
  };
  EXPECT_EQ(message(view({3, 4})), "");
  EXPECT_EQ(message(view({0, 4}, DType::bfloat16)), "");
  const std::string expected = "op: x must be [tokens, d] = [any, 4] float32|bfloat16, got ";
  EXPECT_EQ(message({}), expected + "nothing");
  EXPECT_EQ(message(view({3, 5})), expected + "[3, 5] float32 on cpu");
  EXPECT_EQ(message(view({4})), expected + "[4] float32 on cpu");
  EXPECT_EQ(message(view({3, 4, 1})), expected + "[3, 4, 1] float32 on cpu");
  EXPECT_EQ(message(view({3, 4}, DType::float16)), expected + "[3, 4] float16 on cpu");
}

TEST(Check, MessagesNameEachDtypeOnce) {
  EXPECT_EQ(message_of([] { check.tensor("x", {}, "[n]", {1}, {DType::int64, DType::int32, DType::int64}); }),
            "op: x must be [n] = [1] int64|int32, got nothing");
}

TEST(Check, ContiguousAndUnitLastStrideLookAtStrides) {
  TensorView rows_apart = view({2, 3});
  rows_apart.stride = {5, 1};
  EXPECT_EQ(message_of([&] { check.unit_last_stride("x", rows_apart); }), "");
  EXPECT_EQ(message_of([&] { check.contiguous("x", rows_apart, "[m, n]", {2, 3}, {DType::float32}); }),
            "op: x must be contiguous, got strides [5, 1]");
  TensorView transposed = view({2, 3});
  transposed.stride = {1, 2};
  EXPECT_EQ(message_of([&] { check.unit_last_stride("x", transposed); }),
            "op: x must be contiguous in its last dimension, got strides [1, 2]");
  transposed.shape = {2, 1};
  EXPECT_EQ(message_of([&] { check.unit_last_stride("x", transposed); }), "");
  EXPECT_EQ(message_of([&] { check.contiguous("x", view({2, 3}), "[m, n]", {2, 3}, {DType::float32}); }), "");
}

TEST(Check, OnDeviceRefusesAMixAndPassesAbsentTensors) {
  const TensorView here = view({2});
  TensorView there = here;
  there.device = {DeviceType::cuda, 1};
  EXPECT_EQ(message_of([&] { check.on_device({}, {{"x", here}, {"none", TensorView()}}); }), "");
  EXPECT_EQ(message_of([&] { check.on_device({}, {{"x", here}, {"y", there}}); }),
            "op: y must be on cpu, got [2] float32 on cuda:1");
  EXPECT_EQ(message_of([&] { check.on_device({DeviceType::cuda, 0}, {{"y", there}}); }),
            "op: y must be on cuda:0, got [2] float32 on cuda:1");
}

TEST(Check, AlignedLooksAtTheAddress) {
  TensorView x = view({4});
  EXPECT_EQ(message_of([&] { check.aligned("x", x, 16); }), "");
  x.data = bytes + 6;
  EXPECT_EQ(message_of([&] { check.aligned("x", x, 16); }),
            "op: x must be aligned to 16 bytes, got an address 6 bytes off");
  EXPECT_EQ(message_of([&] { check.aligned("x", x, 2); }), "");
  EXPECT_EQ(message_of([&] { check.aligned("x", {}, 16); }), "");
}

TEST(Check, WorkspaceLooksAtPresenceAndSize) {
  EXPECT_EQ(message_of([] { check.workspace({}, 0); }), "");
  EXPECT_EQ(message_of([] { check.workspace({.workspace = bytes, .workspace_bytes = 8}, 8); }), "");
  EXPECT_EQ(message_of([] { check.workspace({.workspace = bytes, .workspace_bytes = 8}, 9); }),
            "op: workspace must be of at least 9 bytes, got 8");
  EXPECT_EQ(message_of([] { check.workspace({.workspace_bytes = 8}, 8); }),
            "op: workspace must be of at least 8 bytes, got 0");
}

TEST(Check, ThatPrintsTextAndNumbers) {
  EXPECT_EQ(message_of([] { check.that(true, "k", "positive", 3); }), "");
  EXPECT_EQ(message_of([] { check.that(false, "k", "positive", std::int64_t{-3}); }), "op: k must be positive, got -3");
  EXPECT_EQ(message_of([] { check.that(false, "k", "even", std::string("odd")); }), "op: k must be even, got odd");
}

TEST(Check, ErrorsAreInvalidArguments) { EXPECT_THROW(check.fail("x", "a", "b"), std::invalid_argument); }

}  // namespace
}  // namespace dsm
