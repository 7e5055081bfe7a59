// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/weights.h"

#include <algorithm>
#include <type_traits>

#include "src/core/parallel_for.h"
#include "src/core/weight_checks.h"
#include "src/cpu/convert.h"
#include "src/cpu/kernels.h"
#include "src/cpu/quantize_group.h"
#include "src/cpu/tiles.h"
#include "src/cpu/visit_dtype.h"
#include "src/numerics/e8m0.h"
#include "src/numerics/float_traits.h"
#include "src/numerics/fp8.h"

namespace dsm::cpu {
namespace {

using Index = std::int64_t;

// A panel of dequantised weights stays in the second-level cache. Its depth is that of gemm's partial sums, so that
// adding panel after panel gives gemm's bits.
constexpr Index kPanelDepth = 256, kPanelWidth = 256;
constexpr Index kTileRows = 192, kTileColumns = 256, kFewRowsTileColumns = 64;

template <class Acc>
constexpr DType kDType = std::is_same_v<Acc, double> ? DType::float64 : DType::float32;

/// The columns of `a` from j on.
Matrix columns_from(Matrix a, Index j) {
  a.data = static_cast<const char*>(a.data) + j * a.col_stride * element_size(a.dtype);
  return a;
}

template <class Acc>
Acc* panel_scratch() {
  thread_local std::vector<Acc> memory(kPanelDepth * kPanelWidth);
  return memory.data();
}

/// out[i] = the scale at begin + i.
template <class Acc>
void read_scales(const TensorView& scale, Index begin, Index count, Acc* out) {
  if (scale.dtype == DType::float32) {
    std::copy_n(scale.as<const float>() + begin, count, out);
  } else if (scale.dtype == DType::float8_e4m3fn) {
    const float8_e4m3fn* codes = scale.as<const float8_e4m3fn>() + begin;
    for (Index i = 0; i < count; ++i) out[i] = to_float(codes[i]);
  } else {
    const float8_e8m0fnu* codes = scale.as<const float8_e8m0fnu>() + begin;
    for (Index i = 0; i < count; ++i) out[i] = to_float(codes[i]);
  }
}

}  // namespace

Weights::Weights(const TensorView& data, const BlockScales& scales) : data_(data), scales_(scales) {
  if (!data) return;
  count_ = data.rank == 3 ? data.size(0) : 1;
  rows_ = data.size(-2);
  columns_ = weight_columns(data);
  if (is_fp4(data)) {
    scales_.block_rows = 1;
    scales_.block_columns = scales.scale.dtype == DType::float8_e4m3fn ? 16 : 32;
  } else {  // blocks beyond the matrix are as good as its size, and cannot overflow
    scales_.block_rows = std::clamp<Index>(rows_, 1, scales.block_rows);
    scales_.block_columns = std::clamp<Index>(columns_, 1, scales.block_columns);
  }
}

template <class Acc>
void Weights::dequantize(Index matrix, Index row, Index height, Index column, Index width, Acc* out) const {
  const bool fp4 = is_fp4(data_);
  const Index row_bytes = data_.size(-1), block = scales_.block_columns;
  const Index first = column / block, count = (column + width - 1) / block - first + 1;
  const Index scale_rows = scales_.scale.size(-2), scale_columns = scales_.scale.size(-1);
  const float* global = scales_.global ? scales_.global.as<const float>() : nullptr;
  const Index globals = scales_.global.numel(), globals_per_matrix = count_ > 0 ? globals / count_ : 0;
  Acc scales[kPanelWidth + 1];
  for (Index r = row; r < row + height; ++r, out += width) {
    read_scales(scales_.scale, (matrix * scale_rows + r / scales_.block_rows) * scale_columns + first, count, scales);
    Acc factor = 1;
    if (global) factor = globals == 1 ? *global : global[globals_per_matrix == 1 ? matrix : matrix * rows_ + r];
    kernels<Acc>().dequantize(
        {.codes = data_.as<const std::uint8_t>() + (matrix * rows_ + r) * row_bytes + (fp4 ? column / 2 : column),
         .fp4 = fp4,
         .n = width,
         .in_first_block = block - column % block,
         .block = block,
         .scales = scales,
         .factor = factor},
        out);
  }
}

template <class Acc>
void Weights::multiply_transposed(Index matrix, Index row, Index m, Index n, const Matrix& a, Acc* c, Index ldc) const {
  if (!scales_) {
    const Matrix w{data_.as<const char>() + (matrix * rows_ + row) * columns_ * element_size(data_.dtype), data_.dtype,
                   1, columns_};
    return gemm<Acc>(m, n, columns_, 1, a, w, 0, c, ldc);
  }
  if (columns_ == 0) return gemm<Acc>(m, n, 0, 1, a, a, 0, c, ldc);
  Acc* panel = panel_scratch<Acc>();
  for (Index j = 0; j < n; j += kPanelWidth)
    for (Index p = 0; p < columns_; p += kPanelDepth) {
      const Index width = std::min(kPanelWidth, n - j), depth = std::min(kPanelDepth, columns_ - p);
      dequantize(matrix, row + j, width, p, depth, panel);
      gemm<Acc>(m, width, depth, 1, columns_from(a, p), {panel, kDType<Acc>, 1, depth}, p > 0, c + j, ldc);
    }
}

template <class Acc>
void Weights::multiply(Index matrix, Index column, Index m, Index n, const Matrix& a, Acc* c, Index ldc) const {
  if (!scales_) {
    const Matrix w{data_.as<const char>() + (matrix * rows_ * columns_ + column) * element_size(data_.dtype),
                   data_.dtype, columns_, 1};
    return gemm<Acc>(m, n, rows_, 1, a, w, 0, c, ldc);
  }
  if (rows_ == 0) return gemm<Acc>(m, n, 0, 1, a, a, 0, c, ldc);
  Acc* panel = panel_scratch<Acc>();
  for (Index j = 0; j < n; j += kPanelWidth)
    for (Index p = 0; p < rows_; p += kPanelDepth) {
      const Index width = std::min(kPanelWidth, n - j), depth = std::min(kPanelDepth, rows_ - p);
      dequantize(matrix, p, depth, column + j, width, panel);
      gemm<Acc>(m, width, depth, 1, columns_from(a, p), {panel, kDType<Acc>, width, 1}, p > 0, c + j, ldc);
    }
}

template <class A>
void round_to_fp8(A* x, Index n) {
  for (Index begin = 0; begin < n; begin += kFp8Group) {
    const Index end = std::min(n, begin + kFp8Group);
    const A scale = to_float(e4m3_block_scale(largest_magnitude(x + begin, end - begin))), reciprocal = 1 / scale;
    for (Index i = begin; i < end; ++i) x[i] = to_float(to_e4m3_saturating(x[i] * reciprocal)) * scale;
  }
}

Activations::Activations(const TensorView& x, Index rows, ActivationFormat format) : x_(x) {
  if (format == ActivationFormat::none) return;
  const Index columns = x.size(1);
  visit_floating(x.dtype, [&]<class T>() {
    using A = Compute<T>;
    A* copy;
    if constexpr (std::is_same_v<A, double>) {
      wide_.resize(rows * columns);
      copy = wide_.data();
    } else {
      single_.resize(rows * columns);
      copy = single_.data();
    }
    parallel_for(0, rows, std::max<Index>(1, 4096 / std::max<Index>(columns, 1)), [&](Index begin, Index end) {
      for (Index r = begin; r < end; ++r) {
        widen(x.as<const T>() + r * x.stride[0], x.dtype, columns, copy + r * columns);
        round_to_fp8(copy + r * columns, columns);
      }
    });
    x_ = TensorView(copy, kDType<A>, {rows, columns});
  });
}

Matrix Activations::from(Index row, Index column) const {
  return {x_.as<const char>() + (row * x_.stride[0] + column) * element_size(x_.dtype), x_.dtype, x_.stride[0], 1};
}

Matrix Activations::chosen(const std::int32_t* rows, Index column) const {
  Matrix matrix = from(0, column);
  matrix.rows = rows;
  return matrix;
}

void multiply_rows(const TensorView& a, const Weights& weights, bool transpose, ActivationFormat format,
                   const std::vector<Index>& offsets, const TensorView& c) {
  const Index rows = offsets.back(), n = c.size(1);
  const Activations activations(a, rows, format);
  std::vector<Extent> products;
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e) products.push_back({offsets[e + 1] - offsets[e], n});
  visit_floating(c.dtype, [&]<class T>() {
    using A = Compute<T>;
    over_tiles(products, kTileRows, rows > kFewRows ? kTileColumns : kFewRowsTileColumns, [&](const Tile& tile) {
      const Index row = offsets[tile.matrix] + tile.row;
      T* out = c.as<T>() + row * n + tile.column;
      const auto product = [&](A* result, Index ld) {
        if (transpose)
          weights.multiply_transposed(tile.matrix, tile.column, tile.rows, tile.columns, activations.from(row), result,
                                      ld);
        else
          weights.multiply(tile.matrix, tile.column, tile.rows, tile.columns, activations.from(row), result, ld);
      };
      if constexpr (std::is_same_v<T, A>) {
        product(out, n);
      } else {
        A* wide = tile_scratch<A>(tile.rows * tile.columns);
        product(wide, tile.columns);
        for (Index i = 0; i < tile.rows; ++i) narrow(wide + i * tile.columns, tile.columns, out + i * n, c.dtype);
      }
    });
    std::fill(c.as<T>() + rows * n, c.as<T>() + c.numel(), T{});
  });
}

template void Weights::multiply_transposed(Index, Index, Index, Index, const Matrix&, float*, Index) const;
template void Weights::multiply_transposed(Index, Index, Index, Index, const Matrix&, double*, Index) const;
template void Weights::multiply(Index, Index, Index, Index, const Matrix&, float*, Index) const;
template void Weights::multiply(Index, Index, Index, Index, const Matrix&, double*, Index) const;
template void round_to_fp8(float*, Index);
template void round_to_fp8(double*, Index);

}  // namespace dsm::cpu
