// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"
#include "src/cpu/tiles.h"
#include "src/norm_rope/rotate_cpu.h"
#include "src/norm_rope/v4_output_projection/v4_output_projection.h"

namespace dsm {
namespace {

using Index = std::int64_t;

// A tile's heads are rotated into scratch memory as they are needed; a tile is large enough to make that cheap beside
// its products.
constexpr Index kTileTokens = 96, kTileRank = 1024;

/// `count` heads of a token from `head` on, turned back and rounded to o's dtype.
template <class A>
void turn_back(const TensorView& o, Index token, Index head, Index count, TokenRotations<A>& rotations, A* row,
               char* to) {
  const Index d = o.size(2), element = static_cast<Index>(element_size(o.dtype));
  for (Index h = 0; h < count; ++h) {
    const Index offset = token * o.stride[0] + (head + h) * o.stride[1];
    cpu::widen(o.as<const char>() + offset * element, o.dtype, d, row);
    rotate_head(rotations.of(token), row, d);
    cpu::narrow(row, d, to + h * d * element, o.dtype);
  }
}

/// Element (row, column) of a matrix in memory, whose rows are `stride` apart.
cpu::Matrix part(const TensorView& tensor, Index row, Index column, Index stride) {
  const Index offset = (row * stride + column) * static_cast<Index>(element_size(tensor.dtype));
  return {tensor.as<const char>() + offset, tensor.dtype, stride, 1};
}

cpu::Matrix transposed(const cpu::Matrix& m) { return {m.data, m.dtype, m.col_stride, m.row_stride}; }

template <class A>
void store(const A* from, Index n, const TensorView& tensor, Index offset) {
  cpu::narrow(from, n, tensor.as<char>() + offset * static_cast<Index>(element_size(tensor.dtype)), tensor.dtype);
}

template <class A>
void forward(const V4OutputProjectionArgs& a) {
  const Index tokens = a.o.size(0), outputs = a.wo_a.size(0), width = a.wo_a.size(1), rank = outputs / a.groups;
  const Index group_heads = a.o.size(1) / a.groups, element = static_cast<Index>(element_size(a.o.dtype));
  const std::vector<cpu::Extent> results(a.groups, {tokens, rank});
  cpu::over_tiles(results, kTileTokens, kTileRank, [&](const cpu::Tile& t) {
    TokenRotations<A> rotations(a.positions, a.inv_freq, true);
    char* const turned = cpu::tile_scratch<char>(t.rows * width * element);
    A* const sums = cpu::tile_scratch<A>(std::max(t.rows * t.columns, a.o.size(2)));
    for (Index r = 0; r < t.rows; ++r)
      turn_back(a.o, t.row + r, t.matrix * group_heads, group_heads, rotations, sums, turned + r * width * element);
    const Index output = t.matrix * rank + t.column;
    cpu::gemm<A>(t.rows, t.columns, width, 1, {turned, a.o.dtype, width, 1}, transposed(part(a.wo_a, output, 0, width)),
                 0, sums, t.columns);
    for (Index r = 0; r < t.rows; ++r) store(sums + r * t.columns, t.columns, a.z, (t.row + r) * outputs + output);
  });
}

/// A tile is some tokens of one head.
template <class A>
void gradient_of_o(const V4OutputProjectionBackwardArgs& a) {
  const Index tokens = a.o.size(0), heads = a.o.size(1), d = a.o.size(2), width = a.wo_a.size(1);
  const Index rank = a.wo_a.size(0) / a.groups;
  if (tokens * d == 0) return;
  cpu::over_tiles(std::vector<cpu::Extent>(heads, {tokens, d}), kTileTokens, d, [&](const cpu::Tile& t) {
    TokenRotations<A> rotations(a.positions, a.inv_freq, false);
    A* const sums = cpu::tile_scratch<A>(t.rows * d);
    const Index group = t.matrix * d / width, column = t.matrix * d % width;
    cpu::gemm<A>(t.rows, d, rank, 1, part(a.dz, t.row, group * rank, a.dz.stride[0]),
                 part(a.wo_a, group * rank, column, width), 0, sums, d);
    for (Index r = 0; r < t.rows; ++r) {
      rotate_head(rotations.of(t.row + r), sums + r * d, d);
      store(sums + r * d, d, a.d_o, ((t.row + r) * heads + t.matrix) * d);
    }
  });
}

/// A tile is the columns of one head.
template <class A>
void gradient_of_wo_a(const V4OutputProjectionBackwardArgs& a) {
  const Index tokens = a.o.size(0), heads = a.o.size(1), d = a.o.size(2), width = a.wo_a.size(1);
  const Index rank = a.wo_a.size(0) / a.groups, element = static_cast<Index>(element_size(a.o.dtype));
  if (rank * d == 0) return;
  cpu::over_tiles(std::vector<cpu::Extent>(heads, {rank, d}), kTileRank, d, [&](const cpu::Tile& t) {
    TokenRotations<A> rotations(a.positions, a.inv_freq, true);
    char* const turned = cpu::tile_scratch<char>(kTileTokens * d * element);
    A* const sums = cpu::tile_scratch<A>((t.rows + 1) * d);
    std::fill_n(sums, t.rows * d, A(0));
    const Index output = t.matrix * d / width * rank + t.row, column = t.matrix * d % width;
    for (Index token = 0; token < tokens; token += kTileTokens) {
      const Index count = std::min(kTileTokens, tokens - token);
      for (Index r = 0; r < count; ++r)
        turn_back(a.o, token + r, t.matrix, 1, rotations, sums + t.rows * d, turned + r * d * element);
      cpu::gemm<A>(t.rows, d, count, 1, transposed(part(a.dz, token, output, a.dz.stride[0])),
                   {turned, a.o.dtype, d, 1}, 1, sums, d);
    }
    for (Index r = 0; r < t.rows; ++r) store(sums + r * d, d, a.dwo_a, (output + r) * width + column);
  });
}

template <class A>
void backward(const V4OutputProjectionBackwardArgs& a) {
  if (a.d_o) gradient_of_o<A>(a);
  if (a.dwo_a) gradient_of_wo_a<A>(a);
}

}  // namespace

void v4_output_projection_cpu(const V4OutputProjectionArgs& args, const Launch&) {
  args.o.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void v4_output_projection_backward_cpu(const V4OutputProjectionBackwardArgs& args, const Launch&) {
  args.o.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
