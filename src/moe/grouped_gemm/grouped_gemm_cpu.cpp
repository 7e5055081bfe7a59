// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <type_traits>
#include <vector>

#include "src/core/checks.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"
#include "src/cpu/tiles.h"
#include "src/cpu/visit_dtype.h"
#include "src/moe/grouped_gemm/grouped_gemm.h"
#include "src/numerics/float_traits.h"

namespace dsm {
namespace {

constexpr std::int64_t kTileRows = 192, kTileColumns = 256;

/// expert_offsets as a vector, after checking that they cut [0, rows) into ranges.
std::vector<std::int64_t> checked_offsets(const char* operation, const TensorView& expert_offsets, std::int64_t rows) {
  const std::int32_t* given = expert_offsets.as<const std::int32_t>();
  std::vector<std::int64_t> offsets(given, given + expert_offsets.size(0));
  const bool fit = offsets.front() == 0 && std::is_sorted(offsets.begin(), offsets.end()) && offsets.back() <= rows;
  Check(operation).that(fit, "expert_offsets", "from 0, not decreasing and at most rows = " + std::to_string(rows),
                        "other values");
  return offsets;
}

template <class T>
cpu::Matrix matrix_at(const TensorView& tensor, std::int64_t offset, std::int64_t row_stride, std::int64_t col_stride) {
  return {tensor.as<const T>() + offset, tensor.dtype, row_stride, col_stride};
}

/// c[m,n] = a · b, accumulated wide and rounded once; c's rows are ldc elements apart.
template <class T>
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const cpu::Matrix& a, const cpu::Matrix& b, T* c,
              std::int64_t ldc) {
  using A = Compute<T>;
  if constexpr (std::is_same_v<T, A>) {
    cpu::gemm<A>(m, n, k, 1, a, b, 0, c, ldc);
  } else {
    A* wide = cpu::tile_scratch<A>(m * n);
    cpu::gemm<A>(m, n, k, 1, a, b, 0, wide, n);
    for (std::int64_t i = 0; i < m; ++i) cpu::narrow(wide + i * n, n, c + i * ldc, a.dtype);
  }
}

/// c[row] = a[row] · (b[e] or b[e]ᵀ) for every expert's rows, 0 behind them.
template <class T>
void multiply_rows(const TensorView& a, const TensorView& b, bool transpose_b, const std::vector<std::int64_t>& offsets,
                   const TensorView& c) {
  const std::int64_t k = a.size(1), n = c.size(1), rows = c.size(0), experts = b.size(0);
  std::vector<cpu::Extent> products;
  for (std::int64_t e = 0; e < experts; ++e) products.push_back({offsets[e + 1] - offsets[e], n});
  cpu::over_tiles(products, kTileRows, kTileColumns, [&](const cpu::Tile& tile) {
    const std::int64_t row = offsets[tile.matrix] + tile.row, column = tile.column;
    const cpu::Matrix left = matrix_at<T>(a, row * a.stride[0], a.stride[0], 1);
    const cpu::Matrix right = transpose_b ? matrix_at<T>(b, tile.matrix * n * k + column * k, 1, k)
                                          : matrix_at<T>(b, tile.matrix * n * k + column, n, 1);
    multiply(tile.rows, tile.columns, k, left, right, c.as<T>() + row * n + column, n);
  });
  std::fill(c.as<T>() + offsets[experts] * n, c.as<T>() + rows * n, T{});
}

/// out[e] = Σ left[row]ᵀ right[row] over the expert's rows.
template <class T>
void sum_outer_products(const TensorView& left, const TensorView& right, const std::vector<std::int64_t>& offsets,
                        const TensorView& out) {
  const std::int64_t experts = out.size(0), m = out.size(1), n = out.size(2);
  cpu::over_tiles(std::vector<cpu::Extent>(experts, {m, n}), kTileRows, kTileColumns, [&](const cpu::Tile& tile) {
    const std::int64_t first = offsets[tile.matrix], rows = offsets[tile.matrix + 1] - first;
    multiply(tile.rows, tile.columns, rows, matrix_at<T>(left, first * left.stride[0] + tile.row, 1, left.stride[0]),
             matrix_at<T>(right, first * right.stride[0] + tile.column, right.stride[0], 1),
             out.as<T>() + (tile.matrix * m + tile.row) * n + tile.column, n);
  });
}

}  // namespace

void grouped_gemm_cpu(const GroupedGemmArgs& a, const Launch&) {
  const auto offsets = checked_offsets("grouped_gemm", a.expert_offsets, a.a.size(0));
  cpu::visit_floating(a.a.dtype, [&]<class T>() { multiply_rows<T>(a.a, a.b, a.transpose_b, offsets, a.c); });
}

void grouped_gemm_backward_cpu(const GroupedGemmBackwardArgs& a, const Launch&) {
  const auto offsets = checked_offsets("grouped_gemm_backward", a.expert_offsets, a.a.size(0));
  cpu::visit_floating(a.a.dtype, [&]<class T>() {
    if (a.da) multiply_rows<T>(a.dc, a.b, !a.transpose_b, offsets, a.da);
    if (a.db) sum_outer_products<T>(a.transpose_b ? a.dc : a.a, a.transpose_b ? a.a : a.dc, offsets, a.db);
  });
}

}  // namespace dsm
