// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <string>

#include "dsm/error.h"
#include "dsm/mla.h"
#include "dsm/sparse_mla.h"

namespace dsm {
namespace {

// Lists that no memory holds: they are refused, or there is no head to read them for.
constexpr std::int64_t kMost = std::int64_t{1} << 30;

std::string message_of(auto&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(KeyCount, DenseDecode) {
  float number = 0;
  std::int32_t seqlen = 0;
  MlaDecodeArgs args{.q = {&number, DType::float32, {1, 1, 0, 4}},
                     .k_cache = {&number, DType::float32, {0, 1024, 1, 4}},
                     .block_table = {&seqlen, DType::int32, {1, kMost / 1024}},
                     .cache_seqlens = {&seqlen, DType::int32, {1}},
                     .out = {&number, DType::float32, {1, 1, 0, 4}},
                     .lse = {&number, DType::float32, {1, 0, 1}}};
  mla_decode(args);
  args.block_table = {&seqlen, DType::int32, {1, kMost / 1024 + 1}};
  EXPECT_EQ(message_of([&] { mla_decode(args); }),
            "mla_decode: block_table must be of at most 2^30 keys a list, got 1073742848");
}

TEST(KeyCount, SparseDecode) {
  float number = 0;
  std::int32_t index = 0;
  const TensorView most{&index, DType::int32, {1, 1, kMost}}, too_many{&index, DType::int32, {1, 1, kMost + 1}};
  SparseMlaDecodeArgs args{.q = {&number, DType::float32, {1, 1, 0, 4}},
                           .k_cache = {&number, DType::float32, {0, 1, 1, 4}},
                           .indices = most,
                           .extra_k_cache = {&number, DType::float32, {0, 1, 1, 4}},
                           .extra_indices = most,
                           .out = {&number, DType::float32, {1, 1, 0, 4}},
                           .lse = {&number, DType::float32, {1, 0, 1}}};
  sparse_mla_decode(args);
  args.extra_indices = too_many;
  EXPECT_EQ(message_of([&] { sparse_mla_decode(args); }),
            "sparse_mla_decode: extra_indices must be of at most 2^30 keys a list, got 1073741825");
  args.indices = too_many;
  EXPECT_EQ(message_of([&] { sparse_mla_decode(args); }),
            "sparse_mla_decode: indices must be of at most 2^30 keys a list, got 1073741825");
}

TEST(KeyCount, SparsePrefill) {
  float number = 0;
  std::int32_t index = 0;
  SparseMlaPrefillArgs args{.q = {&number, DType::float32, {1, 1, 4}},
                            .kv = {&number, DType::float32, {0, 1, 4}},
                            .indices = {&index, DType::int32, {1, 1, kMost + 1}},
                            .out = {&number, DType::float32, {1, 1, 4}},
                            .max_logits = {&number, DType::float32, {1, 1}},
                            .lse = {&number, DType::float32, {1, 1}}};
  EXPECT_EQ(message_of([&] { sparse_mla_prefill(args); }),
            "sparse_mla_prefill: indices must be of at most 2^30 keys a list, got 1073741825");
}

}  // namespace
}  // namespace dsm
