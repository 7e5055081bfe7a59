// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <vector>

#include "src/attention/gathered_cpu.h"
#include "src/attention/mla_decode/mla_decode.h"
#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/numerics/fp8.h"

namespace dsm {
namespace {

/// The rows of the cache in the type computed in.
template <class A>
class Pages {
 public:
  explicit Pages(const MlaDecodeArgs& args) : cache_(args.k_cache), table_(args.block_table) {
    fp8_ = element_size(cache_.dtype) == 1;
    const float scale = args.k_scale ? *args.k_scale.as<const float>() : 1.f;
    for (int code = 0; fp8_ && code < 256; ++code)
      value_[code] = to_float(float8_e4m3fn{static_cast<std::uint8_t>(code)}) * scale;
  }

  /// Keys [first, first + n) of a request's head.
  void read(std::int64_t request, std::int64_t head, std::int64_t first, std::int64_t n, A* keys) const {
    const auto* table = table_.as<const std::int32_t>() + request * table_.stride[0];
    const std::int64_t page_size = cache_.size(1), d_qk = cache_.size(3);
    for (std::int64_t key = first; key < first + n; ++key, keys += d_qk) {
      const std::int64_t offset =
          table[key / page_size] * cache_.stride[0] + key % page_size * cache_.stride[1] + head * cache_.stride[2];
      const auto* row = cache_.as<const std::uint8_t>() + offset * element_size(cache_.dtype);
      if (fp8_) {
        for (std::int64_t c = 0; c < d_qk; ++c) keys[c] = value_[row[c]];
      } else {
        cpu::widen(row, cache_.dtype, d_qk, keys);
      }
    }
  }

 private:
  TensorView cache_, table_;
  bool fp8_;
  std::array<A, 256> value_;  ///< of each FP8 code
};

template <class A>
void decode(const MlaDecodeArgs& a) {
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  const std::int64_t h_kv = a.k_cache.size(2), heads = h_q / h_kv, d_v = a.out.size(3);
  const std::int64_t block = std::clamp<std::int64_t>(attention::kRowBlock / heads, 1, s_q);
  const std::int64_t blocks = (s_q + block - 1) / block, units = batch * h_kv * blocks;
  const auto* seqlens = a.cache_seqlens.as<const std::int32_t>();
  std::int64_t keys = 0;
  for (std::int64_t b = 0; b < batch; ++b) keys += seqlens[b];
  const Pages<A> pages(a);

  const std::int64_t grain = attention::head_grain(units, keys * s_q * h_q * (d_qk + d_v));
  parallel_for(0, units, grain, [&](std::int64_t unit, std::int64_t last) {
    std::vector<A> q(block * heads * d_qk), out(block * heads * d_v), lse(block * heads);
    for (; unit < last; ++unit) {
      const std::int64_t b = unit / (h_kv * blocks), kv_head = unit / blocks % h_kv;
      const std::int64_t begin = unit % blocks * block, end = std::min(begin + block, s_q);
      const attention::QueryBlock rows{b, begin, end - begin, kv_head * heads, heads};
      rows.load(a.q, q.data());
      // The keys that the block's last query sees, with the last of which it is aligned.
      const std::int64_t hidden = a.causal ? s_q - end : 0;
      const attention::Head head{.q = attention::rows_of(q.data(), d_qk),
                                 .k = {},
                                 .v = {},
                                 .s_q = end - begin,
                                 .s_kv = std::max<std::int64_t>(seqlens[b] - hidden, 0),
                                 .d_qk = d_qk,
                                 .d_v = d_v,
                                 .softmax_scale = a.softmax_scale,
                                 .causal = a.causal,
                                 .heads = heads};
      const auto gather = [&](std::int64_t key, std::int64_t n, A* to) { pages.read(b, kv_head, key, n, to); };
      attention::attend_gathered<A>(head, gather, out.data(), lse.data());
      rows.store(out.data(), a.out);
      rows.store_lse(lse.data(), a.lse);
    }
  });
}

}  // namespace

void mla_decode_cpu(const MlaDecodeArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? decode<double>(args) : decode<float>(args);
}

}  // namespace dsm
