// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "src/core/parallel_for.h"
#include "src/cpu/kernels.h"

namespace dsm::cpu {
namespace {

using Index = std::int64_t;

// Blocks of the operands, sized for caches: a block of A (kRows x kDepth) and one strip of B share a second-level
// cache of 512 KiB; B's block (kDepth x kColumns) is read again for each block of A. kDepth is part of the result
// (gemm.h), the others are not.
constexpr Index kDepth = 256, kRows = 96, kColumns = 1024;

/// Scratch memory of a thread that is kept from call to call and only grows.
class Scratch {
 public:
  template <class T>
  T* reserve(Index count) {
    const std::size_t bytes = (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(std::aligned_alloc(kAlignment, bytes));
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

thread_local Scratch scratch_a, scratch_b;

template <class Acc>
constexpr DType kDType = sizeof(Acc) == 4 ? DType::float32 : DType::float64;

Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

/// The part of a matrix that begins at (i, j).
Matrix from(Matrix matrix, Index i, Index j) {
  Index offset = j * matrix.col_stride;
  if (matrix.rows) {
    matrix.rows += i;
  } else {
    offset += i * matrix.row_stride;
  }
  matrix.data = static_cast<const char*>(matrix.data) + offset * element_size(matrix.dtype);
  return matrix;
}

Matrix transposed(const Matrix& matrix) { return {matrix.data, matrix.dtype, matrix.col_stride, matrix.row_stride}; }

/// Whether a product may read B's rows where they are. Copying a strip costs about as much as multiplying 4 rows by it,
/// and avoids cache sets that large strides overfill.
template <class Acc>
bool read_in_place(const Matrix& b, Index m, Index k) {
  constexpr Index some_rows = 24, small = 32 * 1024 / sizeof(Acc);
  return b.dtype == kDType<Acc> && b.col_stride == 1 && !b.rows && (m <= some_rows || k * b.row_stride <= small);
}

/// Sets the operand A of a product to the first m rows and k columns of `a`, where they are or copied and converted.
template <class Acc>
void set_a(StripProduct<Acc>& product, const Matrix& a, bool copy) {
  if (!copy) {
    product.a = static_cast<const Acc*>(a.data);
    product.a_row_stride = a.row_stride;
    product.a_col_stride = a.col_stride;
    product.a_rows = a.rows;
    return;
  }
  const Kernels<Acc>& kernel = kernels<Acc>();
  // Copied in the order of memory, except for few rows, whose kernel wants adjacent columns.
  const bool by_columns = a.row_stride == 1 && a.col_stride != 1 && !a.rows && product.m > kFewRows;
  const Index ld = round_up(by_columns ? product.m : product.k, kernel.lanes);
  Acc* copied = scratch_a.reserve<Acc>(kRows * kDepth);
  if (by_columns) {
    kernel.widen(transposed(a), product.k, product.m, copied, ld);
  } else {
    kernel.widen(a, product.m, product.k, copied, ld);
  }
  product.a = copied;
  product.a_row_stride = by_columns ? 1 : ld;
  product.a_col_stride = by_columns ? ld : 1;
  product.a_rows = nullptr;
}

/// C[m,n] (+)= alpha A[m,k] B[k,n] for k <= kDepth, n <= kColumns.
template <class Acc>
void multiply_block(Index m, Index n, Index k, Acc alpha, const Matrix& a, const Matrix& b, bool accumulate, Acc* c,
                    Index ldc) {
  const Kernels<Acc>& kernel = kernels<Acc>();
  StripProduct<Acc> product{};
  product.m = m;
  product.n = n;
  product.k = k;
  product.alpha = alpha;
  product.accumulate = accumulate;
  product.c = c;
  product.ldc = ldc;
  if (m <= kFewRows && (b.row_stride == 1 || b.col_stride == 1) && !b.rows) {
    set_a(product, a, a.dtype != kDType<Acc> || a.col_stride != 1 || a.rows);
    return kernel.multiply_few(product, b);
  }
  const Index strip = kernel.strip_columns;
  const bool copy_a = a.dtype != kDType<Acc> || n > 4 * strip;
  const bool in_place = read_in_place<Acc>(b, m, k);
  // With a single block of A each strip is used at once, and one strip's memory, which stays in cache, serves all.
  const Index packed_strips = m > kRows ? (n + strip - 1) / strip : 1;
  Acc* packed = scratch_b.reserve<Acc>(packed_strips * kDepth * strip);
  for (Index i = 0; i < m; i += kRows) {
    product.m = std::min(kRows, m - i);
    set_a(product, from(a, i, 0), copy_a);
    for (Index j = 0; j < n; j += strip) {
      product.n = std::min(strip, n - j);
      product.c = c + i * ldc + j;
      if (in_place && product.n % kernel.lanes == 0) {
        product.b = static_cast<const Acc*>(b.data) + j;
        product.b_row_stride = b.row_stride;
      } else {
        Acc* target = packed + (packed_strips > 1 ? j * kDepth : 0);
        if (i == 0) kernel.widen(from(b, 0, j), k, product.n, target, strip);
        product.b = target;
        product.b_row_stride = strip;
      }
      kernel.multiply_strip(product);
    }
  }
}

}  // namespace

template <class Acc>
void gemm(Index m, Index n, Index k, Acc alpha, const Matrix& a, const Matrix& b, Acc beta, Acc* c, Index ldc) {
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    if (beta == 0)
      for (Index i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, Acc(0));
    return;
  }
  for (Index j = 0; j < n; j += kColumns)
    for (Index p = 0; p < k; p += kDepth)
      multiply_block(m, std::min(kColumns, n - j), std::min(kDepth, k - p), alpha, from(a, 0, p), from(b, p, j),
                     beta != 0 || p > 0, c + j, ldc);
}

template <class Acc>
void parallel_gemm(Index m, Index n, Index k, Acc alpha, const Matrix& a, const Matrix& b, Acc beta, Acc* c,
                   Index ldc) {
  if (m <= 0 || n <= 0) return;
  // Blocks of C, cut until there are enough for many threads or a block is too little work to be worth a hand-over.
  // Columns first: each block of rows copies its columns of B anew.
  constexpr Index enough_blocks = 64, little_work = 1 << 21, row_unit = 12;
  const Index column_unit = kernels<Acc>().strip_columns;
  Index rows = 2 * kRows, columns = kColumns;
  const auto count = [](Index extent, Index block) { return (extent + block - 1) / block; };
  while (count(m, rows) * count(n, columns) < enough_blocks) {
    const Index height = std::min(m, rows), width = std::min(n, columns);
    if (height * width * std::max<Index>(k, 1) <= little_work) break;
    if (width > 2 * column_unit || (height <= row_unit && width > column_unit)) {
      columns = round_up((width + 1) / 2, column_unit);
    } else if (height > row_unit) {
      rows = round_up((height + 1) / 2, row_unit);
    } else {
      break;
    }
  }
  const Index row_blocks = count(m, rows);
  parallel_for(0, row_blocks * count(n, columns), 1, [&](Index begin, Index end) {
    for (Index taken; begin < end; begin += taken) {
      taken = std::min(end - begin, row_blocks - begin % row_blocks);  // blocks above one another, as one
      const Index i = begin % row_blocks * rows, j = begin / row_blocks * columns;
      gemm(std::min(taken * rows, m - i), std::min(columns, n - j), k, alpha, from(a, i, 0), from(b, 0, j), beta,
           c + i * ldc + j, ldc);
    }
  });
}

template void gemm(Index, Index, Index, float, const Matrix&, const Matrix&, float, float*, Index);
template void gemm(Index, Index, Index, double, const Matrix&, const Matrix&, double, double*, Index);
template void parallel_gemm(Index, Index, Index, float, const Matrix&, const Matrix&, float, float*, Index);
template void parallel_gemm(Index, Index, Index, double, const Matrix&, const Matrix&, double, double*, Index);

}  // namespace dsm::cpu
