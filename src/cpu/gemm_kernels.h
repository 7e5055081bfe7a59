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
    if constexpr (R <= 2)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(b + 8 * p.b_row_stride + v * lanes);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b_row[v] = load<T>(b + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> a_element = broadcast(*a[r]);
      a[r] += p.a_col_stride;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += a_element * b_row[v];
    }
  }
  const auto update = [&p](Vector<T> product, const T* c) {
    return p.accumulate ? load<T>(c) + p.alpha * product : p.alpha * product;
  };
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* c = p.c + (i + r) * p.ldc;
#pragma GCC unroll 8
    for (int v = 0; v < V - 1; ++v) store(c + v * lanes, update(sum[r][v], c + v * lanes));
    c += (V - 1) * lanes;
    if (last == lanes) {
      store(c, update(sum[r][V - 1], c));
    } else {
      T part[lanes] = {};
      for (int j = 0; j < last; ++j) part[j] = p.accumulate ? c[j] : T(0);
      store(part, update(sum[r][V - 1], part));
      for (int j = 0; j < last; ++j) c[j] = part[j];
    }
  }
}

template <class T, int V>
void multiply_rows(const StripProduct<T>& p, int last) {
  Index i = 0;
  for (; i + kTileRows <= p.m; i += kTileRows) multiply_tile<T, kTileRows, V>(p, i, last);
  static_assert(kTileRows == 6);
  switch (p.m - i) {
    case 5: return multiply_tile<T, 5, V>(p, i, last);
    case 4: return multiply_tile<T, 4, V>(p, i, last);
    case 3: return multiply_tile<T, 3, V>(p, i, last);
    case 2: return multiply_tile<T, 2, V>(p, i, last);
    case 1: return multiply_tile<T, 1, V>(p, i, last);
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

/// One block of widen_columns: `rows` and `cols` are what exists of it.
template <class T, class Acc>
inline void widen_transposed(const T* source, Index stride, Index rows, Index cols, Acc* out, Index ld) {
  constexpr int side = kSide<Acc>;
  Vector<Acc, side> block[side];
  if (rows >= side && cols >= side) {
    load_transposed<Acc>(source, stride, block);
#pragma GCC unroll 8
    for (int l = 0; l < side; ++l) store(out + l * ld, block[l]);
  } else {
    T edge[side][side] = {};
    for (Index j = 0; j < side && j < cols; ++j)
      for (Index i = 0; i < side && i < rows; ++i) edge[j][i] = source[j * stride + i];
    load_transposed<Acc>(edge[0], side, block);
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
    case DType::float64: return widen_matrix<double>(matrix, rows, cols, out, ld);
    case DType::float32: return widen_matrix<float>(matrix, rows, cols, out, ld);
    case DType::float16: return widen_matrix<Float16>(matrix, rows, cols, out, ld);
    case DType::bfloat16: return widen_matrix<BFloat16>(matrix, rows, cols, out, ld);
    default: __builtin_trap();  // gemm and convert have refused it
  }
}

}  // namespace
}  // namespace dsm::cpu
