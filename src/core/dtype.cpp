// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/dtype.h"

#include <iterator>

namespace dsm {
namespace {

struct Row {
  const char* name;
  int bytes;
};

constexpr Row kRows[] = {
    {"float64", 8},        {"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"float8_e4m3fn", 1}, {"float8_e5m2", 1},
    {"float8_e8m0fnu", 1}, {"uint8", 1},   {"int8", 1},    {"int32", 4},    {"int64", 8},         {"bool", 1},
};
static_assert(std::size(kRows) == static_cast<int>(DType::boolean) + 1);

}  // namespace

int element_size(DType dtype) { return kRows[static_cast<int>(dtype)].bytes; }
const char* name(DType dtype) { return kRows[static_cast<int>(dtype)].name; }

}  // namespace dsm
