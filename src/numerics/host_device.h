// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// Functions marked DSM_HD run on host and device with the same bits.
#if defined(__CUDACC__)
#define DSM_HD __host__ __device__
#else
#define DSM_HD
#endif

// Small functions are always inlined: a copy that the compiler emitted in a source built for a wider instruction set
// could otherwise be the one the linker keeps for every source.
#if defined(__CUDACC__)
#define DSM_HD_INLINE __host__ __device__ __forceinline__
#else
#define DSM_HD_INLINE inline __attribute__((always_inline))
#endif

namespace dsm {

/// a · b rounded to T and not fused into an addition. (The host code is compiled with -ffp-contract=off, nvcc's device
/// code fuses by default.)
template <class T>
DSM_HD_INLINE T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float))
    return __fmul_rn(a, b);
  else
    return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

/// a · b + c with one rounding. The host forms it in double, which every processor has and where the product is exact:
/// the sum is rounded twice there, which changes about one result in 10^8.
DSM_HD_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

}  // namespace dsm
