// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/export.h"

namespace dsm {

/// Element types of tensors. The floating-point names are PyTorch's.
enum class DType : std::uint8_t {
  float64,
  float32,
  float16,
  bfloat16,
  float8_e4m3fn,
  float8_e5m2,
  float8_e8m0fnu,
  uint8,
  int8,
  int32,
  int64,
  boolean,
};

/// Bytes of one element.
DSM_API int element_size(DType dtype);

/// PyTorch's name of the type, e.g. "bfloat16".
DSM_API const char* name(DType dtype);

}  // namespace dsm
