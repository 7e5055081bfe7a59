// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// The inner loops of matrix products. Included only by kernels_*.cpp: see vectors.h.

#include "src/cpu/kernels.h"
#include "src/cpu/vectors.h"

namespace dsm::cpu {
namespace {

// A tile of C is kTileRows x kTileVectors vectors held in registers; with one row of B and one element of A they fill
// the register file (32 registers with AVX-512 and NEON, 16 otherwise).
constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

/// C(i, j) and the elements after it, `count` of them, become (C or 0) + alpha * sum.
template <class T, class V>
inline void update(const StripProduct<T>& p, Index i, Index j, const V& sum, Index count) {
  constexpr int n = sizeof(V) / sizeof(T);
  const V alpha = broadcast<T, n>(p.alpha);
  T* c = p.c + i * p.ldc + j;
  if (count >= n) return store(c, multiply_add(alpha, sum, p.accumulate ? load_bytes<V>(c) : V{}));
  T part[n] = {};
  for (Index l = 0; p.accumulate && l < n && l < count; ++l) part[l] = c[l];
  store(part, multiply_add(alpha, sum, load_bytes<V>(part)));
  for (Index l = 0; l < n && l < count; ++l) c[l] = part[l];
}

/// R rows, V vectors of C; the last vector counts `last` <= lanes columns.
template <class T, int R, int V>
void multiply_tile(const StripProduct<T>& p, Index i, int last) {
  constexpr int lanes = kLanes<T>;
  const T* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = p.a + (p.a_rows ? p.a_rows[i + r] : i + r) * p.a_row_stride;
  const T* b = p.b;
  Vector<T> sum[R][V] = {};
  for (Index q = 0; q < p.k; ++q, b += p.b_row_stride) {
    Vector<T> b_row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b_row[v] = load<T>(b + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> a_element = broadcast(*a[r]);
      a[r] += p.a_col_stride;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(a_element, b_row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) update(p, i + r, v * lanes, sum[r][v], v < V - 1 ? lanes : last);
}

template <class T, int V>
void multiply_rows(const StripProduct<T>& p, int last) {
  Index i = 0;
  for (; i + kTileRows <= p.m; i += kTileRows) multiply_tile<T, kTileRows, V>(p, i, last);
  static_assert(kTileRows == 6);
  switch (p.m - i) {
    case 5:
      return multiply_tile<T, 5, V>(p, i, last);
    case 4:
      return multiply_tile<T, 4, V>(p, i, last);
    case 3:
      return multiply_tile<T, 3, V>(p, i, last);
    case 2:
      return multiply_tile<T, 2, V>(p, i, last);
    case 1:
      return multiply_tile<T, 1, V>(p, i, last);
  }
}

template <class T, int V = kTileVectors>
void multiply_strip(const StripProduct<T>& p) {
  const int full = (V - 1) * kLanes<T>;  // columns of all vectors but the last
  if constexpr (V > 1)
    if (p.n <= full) return multiply_strip<T, V - 1>(p);
  multiply_rows<T, V>(p, static_cast<int>(p.n) - full);
}

/// kLanes<Acc> elements `stride` apart, of which `count` exist and the rest are zero.
template <class Acc, class T>
inline Vector<Acc> gather(const T* source, Index stride, Index count) {
  if (stride == 1 && count >= kLanes<Acc>) return load<Acc>(source);
  T elements[kLanes<Acc>] = {};
  for (Index l = 0; l < kLanes<Acc> && l < count; ++l) elements[l] = source[l * stride];
  return load<Acc>(elements);
}

/// widen() of a matrix whose rows are along memory.
template <class T, class Acc>
void widen_rows(const T* source, const Matrix& matrix, Index rows, Index cols, Acc* out, Index ld) {
  for (Index i = 0; i < rows; ++i) {
    const T* row = source + (matrix.rows ? matrix.rows[i] : i) * matrix.row_stride;
    for (Index j = 0; j < cols; j += kLanes<Acc>)
      store(out + i * ld + j, gather<Acc>(row + j * matrix.col_stride, matrix.col_stride, cols - j));
  }
}

/// load_transposed() of a block of which only `cols` memory rows of `rows` elements exist; the rest is zero.
template <class Acc, class T>
void load_edge_transposed(const T* source, Index stride, Index rows, Index cols, Vector<Acc, kSide<Acc>>* block) {
  constexpr int side = kSide<Acc>;
  T edge[side][side] = {};
  for (Index j = 0; j < side && j < cols; ++j)
    for (Index i = 0; i < side && i < rows; ++i) edge[j][i] = source[j * stride + i];
  load_transposed<Acc>(edge[0], side, block);
}

template <class T, class Acc>
inline void widen_transposed(const T* source, Index stride, Index rows, Index cols, Acc* out, Index ld) {
  constexpr int side = kSide<Acc>;
  Vector<Acc, side> block[side];
  if (rows >= side && cols >= side) {
    load_transposed<Acc>(source, stride, block);
#pragma GCC unroll 8
    for (int l = 0; l < side; ++l) store(out + l * ld, block[l]);
  } else {
    load_edge_transposed<Acc>(source, stride, rows, cols, block);
    for (Index i = 0; i < side && i < rows; ++i) store(out + i * ld, block[i]);
  }
}

/// widen() of a matrix whose columns are along memory, `stride` apart.
template <class T, class Acc>
void widen_columns(const T* source, Index stride, Index rows, Index cols, Acc* out, Index ld) {
  constexpr Index side = kSide<Acc>, depth = 64;  // of slices whose rows of `out` stay in the first-level cache
  const Index padded_cols = (cols + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
  for (Index slice = 0; slice < rows; slice += depth)
    for (Index j = 0; j < padded_cols; j += side)
      for (Index i = slice; i < rows && i < slice + depth; i += side)
        widen_transposed(source + i + j * stride, stride, rows - i, cols - j, out + i * ld + j, ld);
}

template <class T, class Acc>
void widen_matrix(const Matrix& matrix, Index rows, Index cols, Acc* out, Index ld) {
  const T* source = static_cast<const T*>(matrix.data);
  if (matrix.row_stride == 1 && matrix.col_stride != 1 && !matrix.rows) {
    widen_columns(source, matrix.col_stride, rows, cols, out, ld);
  } else {
    widen_rows(source, matrix, rows, cols, out, ld);
  }
}

template <class Acc>
void widen(const Matrix& matrix, Index rows, Index cols, Acc* out, Index ld) {
  switch (matrix.dtype) {
    case DType::float64:
      return widen_matrix<double>(matrix, rows, cols, out, ld);
    case DType::float32:
      return widen_matrix<float>(matrix, rows, cols, out, ld);
    case DType::float16:
      return widen_matrix<Float16>(matrix, rows, cols, out, ld);
    case DType::bfloat16:
      return widen_matrix<BFloat16>(matrix, rows, cols, out, ld);
    default:
      __builtin_trap();  // gemm and convert have refused it
  }
}

// Products with so few rows of A that B is best read once, where and as it is.

/// B's rows are along memory: every row is added to sums of a wide strip, so that memory is read in long runs.
template <class Acc, int R, class T>
void multiply_few_by_rows(const StripProduct<Acc>& p, const T* b, Index stride) {
  constexpr Index lanes = kLanes<Acc>, width = 4096 / sizeof(Acc), together = 8;
  for (Index start = 0; start < p.n; start += width) {
    const Index columns = p.n - start < width ? p.n - start : width;
    Acc sums[R][width];
    for (int r = 0; r < R; ++r)
      for (Index j = 0; j < columns; j += lanes) store(sums[r] + j, Vector<Acc>{});
    for (Index q = 0; q < p.k; q += together) {
      const Index depth = p.k - q < together ? p.k - q : together;
      for (Index j = 0; j < columns; j += lanes) {
        const T* corner = b + q * stride + start + j;
        Vector<Acc> sum[R];
        for (int r = 0; r < R; ++r) sum[r] = load<Acc>(sums[r] + j);
        const auto add = [&](Index l, const Vector<Acc>& b_row) {
          for (int r = 0; r < R; ++r) sum[r] = multiply_add(broadcast(p.a[r * p.a_row_stride + q + l]), b_row, sum[r]);
        };
        if (depth == together && j + lanes <= columns) {
#pragma GCC unroll 8
          for (Index l = 0; l < together; ++l) add(l, load<Acc>(corner + l * stride));
        } else {
          for (Index l = 0; l < depth; ++l) add(l, gather<Acc>(corner + l * stride, 1, columns - j));
        }
        for (int r = 0; r < R; ++r) store(sums[r] + j, sum[r]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (Index j = 0; j < columns; j += lanes) update(p, r, start + j, load<Acc>(sums[r] + j), columns - j);
  }
}

/// B's columns are along memory: blocks of it are transposed in registers, several at a time to overlap their sums.
template <class Acc, int R, class T>
void multiply_few_by_columns(const StripProduct<Acc>& p, const T* b, Index stride) {
  constexpr int side = kSide<Acc>, blocks = R <= 2 ? 2 : 1, line = 64 / sizeof(T);
  using V = Vector<Acc, side>;
  for (Index start = 0; start < p.n; start += blocks * side) {
    V sum[R][blocks] = {};
    const auto add = [&](int v, Index q, int l, const V& b_row) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        sum[r][v] = multiply_add(broadcast<Acc, side>(p.a[r * p.a_row_stride + q + l]), b_row, sum[r][v]);
    };
    // Whole cache lines. Each block works one line behind the one before: columns whose distance is a multiple of the
    // page size share a set of the first-level cache, which holds one block's lines but not two.
    const Index whole = start + blocks * side <= p.n ? p.k / line * line : 0;
    for (Index q = 0; whole > 0 && q < whole + (blocks - 1) * line; q += line)
#pragma GCC unroll 4
      for (int v = 0; v < blocks; ++v) {
        const Index lagging = q - v * line;
        if (lagging < 0 || lagging >= whole) continue;
#pragma GCC unroll 4
        for (int part = 0; part < line; part += side) {
          V block[side];
          load_transposed<Acc>(b + (start + v * side) * stride + lagging + part, stride, block);
#pragma GCC unroll 8
          for (int l = 0; l < side; ++l) add(v, lagging + part, l, block[l]);
        }
      }
    for (Index q = whole; q < p.k; q += side)
      for (int v = 0; v < blocks && start + v * side < p.n; ++v) {
        const Index j = start + v * side;
        V block[side];
        if (j + side <= p.n && q + side <= p.k) {
          load_transposed<Acc>(b + j * stride + q, stride, block);
        } else {
          load_edge_transposed<Acc>(b + j * stride + q, stride, p.k - q, p.n - j, block);
        }
        for (int l = 0; l < side && q + l < p.k; ++l) add(v, q, l, block[l]);
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < blocks; ++v) update(p, r, start + v * side, sum[r][v], p.n - start - v * side);
  }
}

template <class Acc, int R, class T>
void multiply_few_rows(const StripProduct<Acc>& p, const Matrix& b) {
  const T* data = static_cast<const T*>(b.data);
  if (b.col_stride == 1) {
    multiply_few_by_rows<Acc, R>(p, data, b.row_stride);
  } else {
    multiply_few_by_columns<Acc, R>(p, data, b.col_stride);
  }
}

template <class Acc, int R>
void multiply_few_rows(const StripProduct<Acc>& p, const Matrix& b) {
  switch (b.dtype) {
    case DType::float64:
      return multiply_few_rows<Acc, R, double>(p, b);
    case DType::float32:
      return multiply_few_rows<Acc, R, float>(p, b);
    case DType::float16:
      return multiply_few_rows<Acc, R, Float16>(p, b);
    case DType::bfloat16:
      return multiply_few_rows<Acc, R, BFloat16>(p, b);
    default:
      __builtin_trap();
  }
}

template <class Acc>
void multiply_few(const StripProduct<Acc>& p, const Matrix& b) {
  static_assert(kFewRows == 4);
  switch (p.m) {
    case 1:
      return multiply_few_rows<Acc, 1>(p, b);
    case 2:
      return multiply_few_rows<Acc, 2>(p, b);
    case 3:
      return multiply_few_rows<Acc, 3>(p, b);
    case 4:
      return multiply_few_rows<Acc, 4>(p, b);
  }
}

}  // namespace
}  // namespace dsm::cpu
