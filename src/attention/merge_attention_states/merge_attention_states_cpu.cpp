// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <vector>

#include "src/attention/merge_attention_states/merge_attention_states.h"
#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/numerics/softmax_merge.h"

namespace dsm {
namespace {

template <class A>
void merge_all(const MergeAttentionStatesArgs& a) {
  const std::int64_t parts = a.outs.size(0), s_q = a.outs.size(2), h_q = a.outs.size(3), d_v = a.outs.size(4);
  constexpr std::int64_t worth_a_hand_over = 1 << 14;
  const std::int64_t grain = worth_a_hand_over / (parts * d_v + 1) + 1;
  parallel_for(0, a.lse.numel(), grain, [&](std::int64_t row, std::int64_t last) {
    std::vector<A> sum(d_v), wide(d_v);
    for (; row < last; ++row) {
      const std::int64_t b = row / (s_q * h_q), i = row / h_q % s_q, h = row % h_q;
      const auto lse_of = [&](std::int64_t part) {
        const auto& stride = a.lses.stride;
        const A lse = a.lses.as<const A>()[part * stride[0] + b * stride[1] + h * stride[2] + i * stride[3]];
        return lse == kInfinity<A> ? -kInfinity<A> : lse;  // both signs say that there is no key
      };
      SoftmaxState<A> state;
      for (std::int64_t part = 0; part < parts; ++part) state = merge(state, SoftmaxState<A>{lse_of(part), A(1)});
      // The sink joins under the common maximum: neither e^lse nor e^sink may overflow.
      const SoftmaxState<A> all = a.attn_sink ? merge(state, {a.attn_sink.as<const A>()[h], A(1)}) : state;
      std::fill(sum.begin(), sum.end(), A(0));
      for (std::int64_t part = 0; part < parts; ++part) {
        const A part_lse = lse_of(part);
        if (part_lse == -kInfinity<A>) continue;
        const std::int64_t offset =
            part * a.outs.stride[0] + b * a.outs.stride[1] + i * a.outs.stride[2] + h * a.outs.stride[3];
        cpu::widen(a.outs.as<const char>() + offset * element_size(a.outs.dtype), a.outs.dtype, d_v, wide.data());
        const A weight = exp_below_max(part_lse, all.m) / all.l;
        for (std::int64_t c = 0; c < d_v; ++c) sum[c] += weight * wide[c];
      }
      cpu::narrow(sum.data(), d_v, a.out.as<char>() + row * d_v * element_size(a.out.dtype), a.out.dtype);
      a.lse.as<A>()[(b * h_q + h) * s_q + i] = state.l == A(0) ? kInfinity<A> : lse(state);
    }
  });
}

}  // namespace

void merge_attention_states_cpu(const MergeAttentionStatesArgs& args, const Launch&) {
  args.outs.dtype == DType::float64 ? merge_all<double>(args) : merge_all<float>(args);
}

}  // namespace dsm
