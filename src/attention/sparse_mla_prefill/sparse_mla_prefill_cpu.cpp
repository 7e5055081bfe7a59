// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <vector>

#include "src/attention/sparse_mla_cpu.h"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill.h"
#include "src/cpu/vector_math.h"
#include "src/numerics/softmax_merge.h"

namespace dsm {
namespace {

using attention::heads_of;
using attention::product;
using attention::rows_of;
using attention::transposed;

/// Softmax of the columns of x [rows, columns] in place, not yet divided by the sums.
template <class A>
void exponentials(A* x, std::int64_t rows, std::int64_t columns, std::vector<SoftmaxState<A>>& states,
                  std::vector<A>& partial) {
  // Sums of so many rows are added up by themselves: the error grows with rows / kRows + kRows instead of rows.
  constexpr std::int64_t kRows = 64;
  partial.assign(columns, -kInfinity<A>);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < columns; ++c)
      partial[c] = x[row * columns + c] > partial[c] ? x[row * columns + c] : partial[c];
  for (std::int64_t c = 0; c < columns; ++c) {
    states[c] = {partial[c], A(0)};
    if (partial[c] == -kInfinity<A>) partial[c] = A(0);
  }
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < columns; ++c) x[row * columns + c] -= partial[c];
  cpu::exp_scaled(x, rows * columns, A(1), A(0));
  for (std::int64_t begin = 0; begin < rows; begin += kRows) {
    std::fill(partial.begin(), partial.end(), A(0));
    for (std::int64_t row = begin; row < std::min(begin + kRows, rows); ++row)
      for (std::int64_t c = 0; c < columns; ++c) partial[c] += x[row * columns + c];
    for (std::int64_t c = 0; c < columns; ++c) states[c].l += partial[c];
  }
}

template <class A>
void prefill(const SparseMlaPrefillArgs& a) {
  const std::int64_t h_q = a.q.size(1), h_kv = a.kv.size(1), group = h_q / h_kv, topk = a.indices.size(2);
  const std::int64_t d_qk = a.q.size(2), d_v = a.out.size(2), units = a.q.size(0) * h_kv;
  const A* const sink = a.attn_sink ? a.attn_sink.as<const A>() : nullptr;
  const std::int64_t grain = attention::head_grain(units, attention::sparse_mla_work(a, d_qk + d_v));
  parallel_for(0, units, grain, [&](std::int64_t first, std::int64_t last) {
    attention::SelectedKeys keys;
    std::vector<A> p(topk * group), out(group * d_v), factor(group);
    std::vector<SoftmaxState<A>> states(group);
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t query = unit / h_kv, kv_head = unit % h_kv, head = kv_head * group;
      keys.select(a, query, kv_head);
      const std::int64_t n = keys.count();
      const cpu::Matrix kv = keys.of(a.kv, kv_head);
      product(n, group, d_qk, static_cast<A>(a.softmax_scale), kv, transposed(heads_of(a.q, query, head)), p.data());
      exponentials(p.data(), n, group, states, factor);
      for (std::int64_t h = 0; h < group; ++h) {
        const bool none = states[h].l == A(0);
        const A total = none ? kInfinity<A> : lse(states[h]);
        factor[h] = none ? A(0) : (sink ? sink_factor(total, sink[head + h]) : A(1)) / states[h].l;
        if (a.max_logits) a.max_logits.as<A>()[query * h_q + head + h] = states[h].m;
        a.lse.as<A>()[query * a.lse.stride[0] + (head + h) * a.lse.stride[1]] = total;
      }
      for (std::int64_t j = 0; j < n; ++j)
        for (std::int64_t h = 0; h < group; ++h) p[j * group + h] *= factor[h];
      product(group, d_v, n, A(1), transposed(rows_of(p.data(), group)), kv, out.data());
      attention::store_rows(out.data(), group, d_v, a.out, query * a.out.stride[0] + head * a.out.stride[1],
                            a.out.stride[1]);
      if (!a.key_probs) continue;
      A* const probs = a.key_probs.as<A>() + unit * topk;
      std::fill(probs, probs + topk, A(0));
      for (std::int64_t j = 0; j < n; ++j) probs[keys.slots[j]] = cpu::sum(p.data() + j * group, group);
    }
  });
}

}  // namespace

void sparse_mla_prefill_cpu(const SparseMlaPrefillArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? prefill<double>(args) : prefill<float>(args);
}

}  // namespace dsm
