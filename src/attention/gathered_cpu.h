// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <functional>

#include "src/attention/attend_cpu.h"

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

/// Offset, in elements, of one head of one query in a tensor [batch, s_q, heads, d].
inline std::int64_t row_offset(const TensorView& tensor, std::int64_t request, std::int64_t query, std::int64_t head) {
  return request * tensor.stride[0] + query * tensor.stride[1] + head * tensor.stride[2];
}

/// That row in the type computed in.
template <class A>
void load_row(const TensorView& tensor, std::int64_t request, std::int64_t query, std::int64_t head, A* row) {
  cpu::widen(rows_of(tensor, row_offset(tensor, request, query, head), 0).data, tensor.dtype, tensor.size(3), row);
}

/// That row from values in the type computed in.
template <class A>
void store_row(const A* row, const TensorView& tensor, std::int64_t request, std::int64_t query, std::int64_t head) {
  store_rows(row, 1, tensor.size(3), tensor, row_offset(tensor, request, query, head), 0);
}

}  // namespace dsm::attention
