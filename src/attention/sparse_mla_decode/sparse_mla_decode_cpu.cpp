// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <optional>
#include <vector>

#include "src/attention/gathered_cpu.h"
#include "src/attention/sparse_mla_decode/sparse_mla_decode.h"
#include "src/core/parallel_for.h"
#include "src/cpu/kv_rows.h"
#include "src/cpu/vector_math.h"
#include "src/numerics/softmax_merge.h"

namespace dsm {
namespace {

/// One of the two caches with its lists.
class Pool {
 public:
  Pool(const TensorView& cache, const TensorView& indices, const TensorView& length)
      : rows_(cache), indices_(indices), length_(length) {}

  std::int64_t topk() const { return indices_.size(2); }

  /// Appends the rows that a query lists.
  void append_keys(std::int64_t request, std::int64_t query, std::vector<std::int32_t>& keys) const {
    const std::int64_t given = length_ ? length_.as<const std::int32_t>()[request] : topk();
    const auto* list = indices_.as<const std::int32_t>() + request * indices_.stride[0] + query * indices_.stride[1];
    for (std::int64_t i = 0; i < std::clamp<std::int64_t>(given, 0, topk()); ++i)
      if (rows_.valid(list[i])) keys.push_back(list[i]);
  }

  template <class A>
  void read(std::int32_t key, A* row) const {
    rows_.read(key, row);
  }

 private:
  cpu::KvRows rows_;
  TensorView indices_, length_;
};

template <class A>
void decode(const SparseMlaDecodeArgs& a) {
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  const std::int64_t d_v = a.out.size(3), units = batch * s_q;
  const Pool pool(a.k_cache, a.indices, a.topk_length);
  std::optional<Pool> extra;
  if (a.extra_k_cache) extra.emplace(a.extra_k_cache, a.extra_indices, a.extra_topk_length);
  const std::int64_t most_keys = pool.topk() + (extra ? extra->topk() : 0);

  const std::int64_t grain = attention::head_grain(units, units * h_q * most_keys * (d_qk + d_v));
  parallel_for(0, units, grain, [&](std::int64_t unit, std::int64_t last) {
    std::vector<A> q(h_q * d_qk), out(h_q * d_v), lse(h_q);
    std::vector<std::int32_t> keys;
    for (; unit < last; ++unit) {
      const std::int64_t b = unit / s_q, i = unit % s_q;
      keys.clear();
      pool.append_keys(b, i, keys);
      const auto of_first = static_cast<std::int64_t>(keys.size());
      if (extra) extra->append_keys(b, i, keys);
      const attention::QueryBlock rows{b, i, 1, 0, h_q};
      rows.load(a.q, q.data());
      const attention::Head head{.q = attention::rows_of(q.data(), d_qk),
                                 .k = {},
                                 .v = {},
                                 .s_q = 1,
                                 .s_kv = static_cast<std::int64_t>(keys.size()),
                                 .d_qk = d_qk,
                                 .d_v = d_v,
                                 .softmax_scale = a.softmax_scale,
                                 .causal = false,
                                 .heads = h_q};
      const auto gather = [&](std::int64_t first, std::int64_t n, A* to) {
        for (std::int64_t key = first; key < first + n; ++key, to += d_qk)
          (key < of_first ? pool : *extra).read(keys[key], to);
      };
      attention::attend_gathered<A>(head, gather, out.data(), lse.data());
      if (a.attn_sink) {
        for (std::int64_t h = 0; h < h_q; ++h)
          cpu::scale(out.data() + h * d_v, d_v, sink_factor(lse[h], a.attn_sink.as<const A>()[h]));
      }
      rows.store(out.data(), a.out);
      rows.store_lse(lse.data(), a.lse);
    }
  });
}

}  // namespace

void sparse_mla_decode_cpu(const SparseMlaDecodeArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? decode<double>(args) : decode<float>(args);
}

}  // namespace dsm
