// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/dtype.h"

namespace dsm::cpu {

/// A read-only matrix of float64, float32, float16 or bfloat16 with any strides (in elements): element (i, j) is at
/// data + i * row_stride + j * col_stride. Swapped strides transpose.
struct Matrix {
  const void* data;
  DType dtype;
  std::int64_t row_stride, col_stride;
  /// If not null, row i is at rows[i] * row_stride: a product over chosen rows without copying them.
  const std::int32_t* rows = nullptr;
};

/// C[m,n] = alpha A[m,k] B[k,n] + beta C, in the calling thread.
///
/// Acc is float or double; operands are converted to it (exactly, but for float64 into float). C is row-major with
/// rows ldc elements apart and may not overlap A or B. beta is 0 (C is not read and may hold anything) or 1. `b.rows`
/// chooses rows of B, likewise.
///
/// Summation: products are added one after another within each 256 consecutive k, and these partial sums one after
/// another; products are fused into sums where the processor can. So the bits of C[i,j] depend only on row i of A,
/// column j of B, alpha, beta and C[i,j] (and on whether the processor fuses) — not on m, n, strides, dtype of
/// storage, position or threads. Error: |C - exact| <= (min(k, 256) + k/256 + 2) eps |alpha| sum |a b| + eps |C|.
template <class Acc>
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Acc alpha, const Matrix& a, const Matrix& b, Acc beta, Acc* c,
          std::int64_t ldc);

/// The same with the same bits, blocks of C being split over the CPU threads.
template <class Acc>
void parallel_gemm(std::int64_t m, std::int64_t n, std::int64_t k, Acc alpha, const Matrix& a, const Matrix& b,
                   Acc beta, Acc* c, std::int64_t ldc);

}  // namespace dsm::cpu
