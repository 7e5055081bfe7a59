// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "src/core/checks.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"
#include "src/cpu/tiles.h"
#include "src/cpu/visit_dtype.h"
#include "src/cpu/weights.h"
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

cpu::Matrix transposed(cpu::Matrix matrix) {
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

/// out[e] = Σ left[row]ᵀ right[row] over the expert's rows, accumulated wide and rounded once.
template <class T>
void sum_outer_products(const cpu::Activations& left, const cpu::Activations& right,
                        const std::vector<std::int64_t>& offsets, const TensorView& out) {
  using A = Compute<T>;
  const std::int64_t experts = out.size(0), m = out.size(1), n = out.size(2);
  cpu::over_tiles(std::vector<cpu::Extent>(experts, {m, n}), kTileRows, kTileColumns, [&](const cpu::Tile& tile) {
    const std::int64_t first = offsets[tile.matrix], rows = offsets[tile.matrix + 1] - first;
    const cpu::Matrix a = transposed(left.from(first, tile.row)), b = right.from(first, tile.column);
    T* c = out.as<T>() + (tile.matrix * m + tile.row) * n + tile.column;
    if constexpr (std::is_same_v<T, A>) {
      cpu::gemm<A>(tile.rows, tile.columns, rows, 1, a, b, 0, c, n);
    } else {
      A* wide = cpu::tile_scratch<A>(tile.rows * tile.columns);
      cpu::gemm<A>(tile.rows, tile.columns, rows, 1, a, b, 0, wide, tile.columns);
      for (std::int64_t i = 0; i < tile.rows; ++i)
        cpu::narrow(wide + i * tile.columns, tile.columns, c + i * n, out.dtype);
    }
  });
}

}  // namespace

void grouped_gemm_cpu(const GroupedGemmArgs& a, const Launch&) {
  const auto offsets = checked_offsets("grouped_gemm", a.expert_offsets, a.a.size(0));
  cpu::multiply_rows(a.a, {a.b, a.b_scales}, a.transpose_b, a.activation_format, offsets, a.c);
}

void grouped_gemm_backward_cpu(const GroupedGemmBackwardArgs& a, const Launch&) {
  const auto offsets = checked_offsets("grouped_gemm_backward", a.expert_offsets, a.a.size(0));
  if (a.da) cpu::multiply_rows(a.dc, {a.b, a.b_scales}, !a.transpose_b, ActivationFormat::none, offsets, a.da);
  if (!a.db) return;
  const cpu::Activations activations(a.a, offsets.back(), a.activation_format);
  const cpu::Activations gradients(a.dc, offsets.back(), ActivationFormat::none);
  cpu::visit_floating(a.a.dtype, [&]<class T>() {
    sum_outer_products<T>(a.transpose_b ? gradients : activations, a.transpose_b ? activations : gradients, offsets,
                          a.db);
  });
}

}  // namespace dsm
