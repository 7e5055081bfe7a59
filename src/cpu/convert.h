// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/dtype.h"
#include "dsm/tensor_view.h"

namespace dsm::cpu {

/// out[i] = x[i] for float64, float32, float16 or bfloat16 x. Exact, but float64 to float rounds to nearest.
template <class T>
void widen(const void* x, DType dtype, std::int64_t n, T* out);

/// As above: row i of a tensor [rows, n], whose rows may be any distance apart.
template <class T>
void widen_row(const TensorView& x, std::int64_t i, T* out) {
  widen(x.as<const char>() + i * x.stride[0] * element_size(x.dtype), x.dtype, x.shape[1], out);
}

/// out[i] = x[i] in the given dtype, rounded to nearest, ties to even (through float, if from double to 16 bits);
/// beyond the largest finite value lies infinity, and NaN stays NaN.
template <class T>
void narrow(const T* x, std::int64_t n, void* out, DType dtype);

}  // namespace dsm::cpu
