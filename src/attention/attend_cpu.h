// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "dsm/tensor_view.h"
#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"

// Softmax attention of one head: what all dense attention operators share on the CPU. `A` is the type computed in,
// float or double; the operands may be stored in any floating dtype, elements of a row adjacent. Callers with at least
// as many heads as threads call these functions from a parallel_for; otherwise the functions find work for the threads
// themselves.
namespace dsm::attention {

/// One key head with the query rows that use it. Row i of q is query i; with `heads` > 1, head i % heads of query
/// i / heads, so that all the heads of a group make one product.
struct Head {
  cpu::Matrix q;  ///< [s_q * heads, d_qk]
  cpu::Matrix k;  ///< [s_kv, d_qk]
  cpu::Matrix v;  ///< [s_kv, d_v]
  std::int64_t s_q, s_kv, d_qk, d_v;
  double softmax_scale;
  bool causal;
  std::int64_t heads = 1;

  /// Number of keys that row i sees; they are the first ones.
  std::int64_t visible(std::int64_t i) const {
    return causal ? std::clamp<std::int64_t>(i / heads + 1 + s_kv - s_q, 0, s_kv) : s_kv;
  }
  /// The first row that sees key j; all later ones do, too.
  std::int64_t first_query(std::int64_t j) const {
    return causal ? std::max<std::int64_t>(j + s_q - s_kv, 0) * heads : 0;
  }
};

/// Grain of a parallel_for over units (a head, or a block of its queries) of `work` multiply-adds in all: fewer units
/// than threads stay together, and so do units that are too small to be worth a hand-over to another thread.
inline std::int64_t head_grain(std::int64_t units, std::int64_t work) {
  constexpr std::int64_t worth_a_hand_over = 1 << 18;
  if (units < num_threads()) return units;
  return std::max<std::int64_t>(1, worth_a_hand_over * units / std::max<std::int64_t>(work, 1));
}

/// Queries for one attend() call: enough to reuse the keys that it reads, few enough for its tiles to stay in cache.
inline constexpr std::int64_t kQueryBlock = 64;

/// Outputs and log-sum-exps of rows [begin, end), which must not be empty: out [end - begin, d_v] without gaps, lse
/// [end - begin].
template <class A>
void attend(const Head& head, std::int64_t begin, std::int64_t end, A* out, A* lse);

/// What the gradients of one head are made of, and where they go.
template <class A>
struct HeadGradient {
  cpu::Matrix dout;  ///< [s_q, d_v]
  const A* lse;      ///< [s_q]
  const A* delta;    ///< [s_q] dout_i · out_i − dlse_i
  A* dq;             ///< [s_q, d_qk] without gaps, added to
  A* dk;             ///< [s_kv, d_qk] without gaps, added to
  A* dv;             ///< [s_kv, d_v] without gaps, added to
};
template <class A>
void attend_backward(const Head& head, const HeadGradient<A>& gradient);

/// The matrix whose rows begin `offset` elements into the tensor and lie `row_stride` elements apart.
inline cpu::Matrix rows_of(const TensorView& tensor, std::int64_t offset, std::int64_t row_stride) {
  return {tensor.as<const char>() + offset * element_size(tensor.dtype), tensor.dtype, row_stride, 1};
}

/// The matrix of adjacent rows in memory of this process.
template <class A>
cpu::Matrix rows_of(const A* data, std::int64_t columns) {
  return {data, sizeof(A) == sizeof(double) ? DType::float64 : DType::float32, columns, 1};
}

/// The part of a matrix from (row, column) on.
inline cpu::Matrix from(cpu::Matrix matrix, std::int64_t row, std::int64_t column = 0) {
  const std::int64_t offset = row * matrix.row_stride + column * matrix.col_stride;
  matrix.data = static_cast<const char*>(matrix.data) + offset * element_size(matrix.dtype);
  return matrix;
}

inline cpu::Matrix transposed(cpu::Matrix matrix) {
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

/// Rounds adjacent rows of computed values into the rows that rows_of() of the same arguments describes.
template <class A>
void store_rows(const A* values, std::int64_t rows, std::int64_t columns, const TensorView& tensor, std::int64_t offset,
                std::int64_t row_stride) {
  for (std::int64_t row = 0; row < rows; ++row) {
    char* const target = tensor.as<char>() + (offset + row * row_stride) * element_size(tensor.dtype);
    cpu::narrow(values + row * columns, columns, target, tensor.dtype);
  }
}

}  // namespace dsm::attention
