// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dsm/tensor_view.h"
#include "src/cpu/convert.h"
#include "src/cpu/gemm.h"

// Residual streams on the CPU: what the operators of hyper-connections share. `A` is the type computed in, float or
// double; tensors may be of any floating dtype.
namespace dsm::hyper_connection {

using Index = std::int64_t;

template <class A>
inline constexpr DType kWide = std::is_same_v<A, double> ? DType::float64 : DType::float32;

/// Rows whose elements add up to about this many go to one thread at a time.
inline Index token_grain(Index elements) { return std::max<Index>(1, 16384 / std::max<Index>(1, elements)); }

/// Calls `f.template operator()<A>()` with the type that an operator on x computes in.
template <class F>
void visit_wide(const TensorView& x, F&& f) {
  x.dtype == DType::float64 ? f.template operator()<double>() : f.template operator()<float>();
}

/// Where the row of a tensor begins that has the given first indices.
inline char* row(const TensorView& tensor, Index i, Index j = 0) {
  const Index offset = i * tensor.stride[0] + (tensor.rank > 2 ? j * tensor.stride[1] : 0);
  return tensor.as<char>() + offset * static_cast<Index>(element_size(tensor.dtype));
}

/// A token's streams [hc, hidden], or its row [hidden], without gaps in A.
template <class A>
void load_token(const TensorView& tensor, Index token, A* to) {
  const Index n = tensor.size(-1);
  for (Index j = 0; j < (tensor.rank > 2 ? tensor.size(1) : 1); ++j)
    cpu::widen(row(tensor, token, j), tensor.dtype, n, to + j * n);
}

/// Rounds a token's streams or its row into a contiguous tensor.
template <class A>
void store_token(const A* from, const TensorView& tensor, Index token) {
  cpu::narrow(from, tensor.numel() / tensor.size(0), row(tensor, token), tensor.dtype);
}

/// Adjacent rows of A.
template <class A>
cpu::Matrix matrix(const A* data, Index columns) {
  return {data, kWide<A>, columns, 1};
}

template <class A>
cpu::Matrix transposed(const A* data, Index columns) {
  return {data, kWide<A>, 1, columns};
}

}  // namespace dsm::hyper_connection
