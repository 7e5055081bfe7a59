// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/dtype.h"
#include "src/numerics/bf16.h"
#include "src/numerics/fp16.h"

namespace dsm::cpu {

/// Calls `f.template operator()<T>()` with the storage type of a floating dtype (float64, float32, float16, bfloat16).
/// The operator's checks have refused every other dtype before.
template <class F>
decltype(auto) visit_floating(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64:
      return f.template operator()<double>();
    case DType::float16:
      return f.template operator()<float16>();
    case DType::bfloat16:
      return f.template operator()<bfloat16>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace dsm::cpu
