// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// What is compiled once for each CPU instruction set (kernels_*.cpp) and chosen when the program starts.

#include <cstdint>

#include "src/cpu/gemm.h"

namespace dsm::cpu {

/// C[m,n] (+)= alpha A[m,k] B[k,n].
template <class Acc>
struct StripProduct {
  std::int64_t m, n, k;
  Acc alpha;
  const Acc* a;
  std::int64_t a_row_stride, a_col_stride;
  const std::int32_t* a_rows;  ///< as Matrix::rows
  const Acc* b;                ///< rows are contiguous, and readable up to n rounded up to `lanes`
  std::int64_t b_row_stride;
  bool accumulate;  ///< false: C is not read
  Acc* c;
  std::int64_t ldc;
};

constexpr std::int64_t kFewRows = 4;

/// Neighbouring elements of a row of quantised weights: (code · scale of its block) · factor.
template <class T>
struct QuantizedRow {
  const std::uint8_t* codes;  ///< E4M3, or two E2M1 in a byte, the first one in the low nibble
  bool fp4;                   ///< E2M1; then n, in_first_block and block are even
  std::int64_t n;
  std::int64_t in_first_block;  ///< elements of the first block from here on
  std::int64_t block;           ///< elements of the others
  const T* scales;              ///< the first block's, then the others'
  T factor;
};

/// Building blocks for float or double. What each does is said where its caller is declared: gemm.h, convert.h,
/// vector_math.h.
template <class T>
struct Kernels {
  std::int64_t lanes;          ///< elements of a SIMD vector
  std::int64_t strip_columns;  ///< columns of B that stay in registers
  /// n <= strip_columns.
  void (*multiply_strip)(const StripProduct<T>&);
  /// m <= kFewRows, A's columns adjacent, and B as given, with row_stride or col_stride 1 and no `rows`.
  void (*multiply_few)(const StripProduct<T>&, const Matrix& b);

  /// out[i * ld + j] = T(matrix(i, j)); columns are zero-filled up to a multiple of `lanes`, which ld must allow.
  void (*widen)(const Matrix&, std::int64_t rows, std::int64_t cols, T* out, std::int64_t ld);
  void (*narrow)(const T*, std::int64_t n, void* out, DType);
  /// out[i] = element i; each product is rounded to T.
  void (*dequantize)(const QuantizedRow<T>&, T* out);

  T (*exp_scaled)(T* x, std::int64_t n, T scale, T shift);
  void (*sigmoid)(const T* x, std::int64_t n, T* y);
  void (*silu)(const T* x, std::int64_t n, T* y);
  void (*scale)(T* x, std::int64_t n, T factor);
  T (*max)(const T* x, std::int64_t n);
  T (*sum)(const T* x, std::int64_t n);
  T (*dot)(const T* x, const T* y, std::int64_t n);
};

enum class Isa { baseline, avx2, avx512 };

struct IsaKernels {
  Kernels<float> f32;
  Kernels<double> f64;
};

extern const IsaKernels kBaselineKernels;
#if defined(__x86_64__)
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kAvx512Kernels;
#endif

/// Whether this processor (and its operating system) can run the instruction set's kernels.
bool supported(Isa);

/// The kernels in use: those of the best supported instruction set.
template <class T>
const Kernels<T>& kernels();

/// Runs every later call with another instruction set, which must be supported. Not while operators are running.
void set_isa_for_test(Isa);

}  // namespace dsm::cpu
