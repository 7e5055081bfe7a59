// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dsm/tensor_view.h"
#include "src/attention/attend_cpu.h"
#include "src/core/parallel_for.h"
#include "src/cpu/gemm.h"

// What both passes of sparse_mla share on the CPU. Scores are kept as [keys, heads]: a product whose left rows are the
// listed rows of kv needs no copy of them, and what depends on the head alone is a vector along memory.
namespace dsm::attention {

/// The keys of one query and key head.
struct SelectedKeys {
  std::vector<std::int32_t> rows;   ///< of kv
  std::vector<std::int32_t> slots;  ///< where the list names them

  std::int64_t count() const { return static_cast<std::int64_t>(rows.size()); }

  template <class Args>
  void select(const Args& a, std::int64_t query, std::int64_t kv_head) {
    rows.clear();
    slots.clear();
    const auto* indices =
        a.indices.template as<const std::int32_t>() + query * a.indices.stride[0] + kv_head * a.indices.stride[1];
    std::int64_t length = a.indices.size(2);
    if (a.topk_length) length = std::min<std::int64_t>(length, a.topk_length.template as<const std::int32_t>()[query]);
    for (std::int64_t slot = 0; slot < length; ++slot) {
      if (indices[slot] < 0 || indices[slot] >= a.kv.size(0)) continue;
      rows.push_back(indices[slot]);
      slots.push_back(static_cast<std::int32_t>(slot));
    }
  }

  /// Their rows of kv, [count, d_qk].
  cpu::Matrix of(const TensorView& kv, std::int64_t kv_head) const {
    cpu::Matrix matrix = rows_of(kv, kv_head * kv.stride[1], kv.stride[0]);
    matrix.rows = rows.data();
    return matrix;
  }
};

/// The heads of one query from `head` on, as rows.
inline cpu::Matrix heads_of(const TensorView& tensor, std::int64_t query, std::int64_t head) {
  return rows_of(tensor, query * tensor.stride[0] + head * tensor.stride[1], tensor.stride[1]);
}

/// gemm in the calling thread, or over all threads where they have no other work; with the same bits.
template <class A>
void product(std::int64_t m, std::int64_t n, std::int64_t k, A alpha, const cpu::Matrix& a, const cpu::Matrix& b,
             A* c) {
  const auto multiply = num_threads() == 1 ? cpu::gemm<A> : cpu::parallel_gemm<A>;
  multiply(m, n, k, alpha, a, b, A(0), c, n);
}

/// Multiply-adds per unit of `columns` that a (query, key head) takes in all.
template <class Args>
std::int64_t sparse_mla_work(const Args& a, std::int64_t columns) {
  return a.indices.numel() * (a.q.size(1) / a.kv.size(1)) * columns;
}

}  // namespace dsm::attention
