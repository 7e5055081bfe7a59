// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <functional>

#include "src/attention/attend_cpu.h"
#include "src/cpu/convert.h"
#include "src/numerics/softmax_merge.h"

// Attention over keys that lie scattered in a cache: they are gathered and widened a tile at a time, each once for all
// the query rows that see them.
namespace dsm::attention {

/// Rows of one call of attend_gathered(): enough to reuse each gathered key, few enough for tiles to stay in cache.
inline constexpr std::int64_t kRowBlock = 128;

/// Writes the keys [first, first + n), d_qk wide without gaps, in the type computed in.
template <class A>
using Gather = std::function<void(std::int64_t first, std::int64_t n, A* keys)>;

/// As attend() for all s_q * heads rows, with keys from `gather` (head.k is not read), whose first d_v columns are the
/// values (nor is head.v). Long key sequences are spread over the CPU threads when the caller runs on one.
template <class A>
void attend_gathered(const Head& head, const Gather<A>& gather, A* out, A* lse);

/// The rows of one product: heads [head, head + heads) of the queries [query, query + queries) of a request, a query's
/// heads side by side.
struct QueryBlock {
  std::int64_t request, query, queries, head, heads;

  std::int64_t rows() const { return queries * heads; }

  /// Reads the rows of a tensor [batch, s_q, h_q, d] into rows without gaps in the type computed in.
  template <class A>
  void load(const TensorView& tensor, A* values) const {
    for (std::int64_t row = 0; row < rows(); ++row, values += tensor.size(3))
      cpu::widen(rows_of(tensor, offset(tensor, row), 0).data, tensor.dtype, tensor.size(3), values);
  }

  /// Rounds such rows into a tensor [batch, s_q, h_q, d].
  template <class A>
  void store(const A* values, const TensorView& tensor) const {
    const std::int64_t d = tensor.size(3);
    for (std::int64_t row = 0; row < rows(); ++row) store_rows(values + row * d, 1, d, tensor, offset(tensor, row), 0);
  }

  /// Stores log-sum-exps in a contiguous tensor [batch, h_q, s_q], where +inf says that there was no key.
  template <class A>
  void store_lse(const A* lse, const TensorView& tensor) const {
    for (std::int64_t row = 0; row < rows(); ++row) {
      const std::int64_t h = request * tensor.size(1) + head + row % heads;
      tensor.as<A>()[h * tensor.size(2) + query + row / heads] = lse[row] == -kInfinity<A> ? kInfinity<A> : lse[row];
    }
  }

 private:
  std::int64_t offset(const TensorView& tensor, std::int64_t row) const {
    return request * tensor.stride[0] + (query + row / heads) * tensor.stride[1] +
           (head + row % heads) * tensor.stride[2];
  }
};

}  // namespace dsm::attention
