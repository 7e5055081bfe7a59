// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/numerics/float_traits.h"

// The conversions of src/numerics/float_traits.h in the device's own instructions: the same numbers, NaN payloads
// apart.

namespace dsm::cuda {

template <class T>
__device__ __forceinline__ Compute<T> widened(T x) {
  if constexpr (std::is_same_v<T, float16>)
    return __half2float(__ushort_as_half(x.bits));
  else
    return widen(x);
}

template <class T, class Wide>
__device__ __forceinline__ T narrowed(Wide x) {
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Wide, float>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, float16> && std::is_same_v<Wide, float>)
    return {__half_as_ushort(__float2half_rn(x))};
  else
    return narrow<T>(x);
}

}  // namespace dsm::cuda
