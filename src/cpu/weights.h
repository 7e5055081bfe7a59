// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include "dsm/block_scales.h"
#include "dsm/tensor_view.h"
#include "src/cpu/gemm.h"

namespace dsm::cpu {

/// Weight matrices [count, rows, columns], floating or quantised (BlockScales), and products with them. Quantised
/// weights are turned into numbers panel by panel, each once per product; the bits are those of gemm() with the whole
/// matrix as numbers of type Acc.
class Weights {
 public:
  Weights() = default;
  /// `data` is [rows, columns] or [count, rows, columns] as check_weight() has passed it.
  Weights(const TensorView& data, const BlockScales& scales);

  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }

  /// c[m, n] = a[m, columns] · W[row .. row + n)ᵀ of one matrix, in the calling thread; c's rows are ldc apart.
  template <class Acc>
  void multiply_transposed(std::int64_t matrix, std::int64_t row, std::int64_t m, std::int64_t n, const Matrix& a,
                           Acc* c, std::int64_t ldc) const;

  /// c[m, n] = a[m, rows] · W[:, column .. column + n), likewise; `column` is even.
  template <class Acc>
  void multiply(std::int64_t matrix, std::int64_t column, std::int64_t m, std::int64_t n, const Matrix& a, Acc* c,
                std::int64_t ldc) const;

 private:
  /// The part [row, row + height) x [column, column + width) of one matrix as numbers, rows `width` apart.
  template <class Acc>
  void dequantize(std::int64_t matrix, std::int64_t row, std::int64_t height, std::int64_t column, std::int64_t width,
                  Acc* out) const;

  TensorView data_;
  BlockScales scales_;
  std::int64_t count_ = 0, rows_ = 0, columns_ = 0;
};

/// Rows of activations for products: the tensor itself, or a rounded copy.
class Activations {
 public:
  /// x is [rows, columns], its rows any distance apart; only the first `rows` are read.
  Activations(const TensorView& x, std::int64_t rows, ActivationFormat format);
  Activations(const Activations&) = delete;
  Activations& operator=(const Activations&) = delete;

  /// From one row and column on.
  Matrix from(std::int64_t row, std::int64_t column = 0) const;
  /// Rows chosen by number, from one column on.
  Matrix chosen(const std::int32_t* rows, std::int64_t column = 0) const;

 private:
  TensorView x_;
  std::vector<float> single_;
  std::vector<double> wide_;
};

/// Neighbours that share a scale under ActivationFormat::fp8.
constexpr std::int64_t kFp8Group = 128;

/// What ActivationFormat::fp8 makes of a row, or of a part of it that begins with a group; A is float or double.
template <class A>
void round_to_fp8(A* x, std::int64_t n);

/// c[row] = a[row] · W[e]ᵀ (or · W[e]) for the rows [offsets[e], offsets[e + 1]) of every matrix e, 0 behind them, on
/// all threads; accumulated wide, rounded once. a and c have one floating dtype, c is contiguous.
void multiply_rows(const TensorView& a, const Weights& weights, bool transpose, ActivationFormat format,
                   const std::vector<std::int64_t>& offsets, const TensorView& c);

}  // namespace dsm::cpu
