// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// The kernels as compiled for this file's instruction set. Included only by kernels_*.cpp: see vectors.h.

#include "src/cpu/dequantize_kernels.h"
#include "src/cpu/gemm_kernels.h"
#include "src/cpu/vector_math_kernels.h"

namespace dsm::cpu {
namespace {

template <class T>
constexpr Kernels<T> kKernels = {
    .lanes = kLanes<T>,
    .strip_columns = kTileVectors * kLanes<T>,
    .multiply_strip = multiply_strip<T>,
    .multiply_few = multiply_few<T>,
    .widen = widen<T>,
    .narrow = narrow_to<T>,
    .dequantize = dequantize<T>,
    .exp_scaled = exp_scaled_array<T>,
    .sigmoid = sigmoid_array<T>,
    .silu = silu_array<T>,
    .scale = scale_array<T>,
    .max = max_of_array<T>,
    .sum = sum_of_array<T>,
    .dot = dot_of_arrays<T>,
};

}  // namespace
}  // namespace dsm::cpu
