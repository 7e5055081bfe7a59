// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "src/attention/attend_cpu.h"
#include "src/attention/flash_attn/flash_attn.h"
#include "src/cpu/convert.h"
#include "src/cpu/vector_math.h"

namespace dsm {
namespace {

using attention::from;
using attention::rows_of;
using attention::store_rows;

/// Rows [begin, begin + rows) of one sequence in a tensor whose last three dimensions are [rows, heads, d].
struct Span {
  std::int64_t batch, begin, rows;

  std::int64_t offset(const TensorView& t, std::int64_t head) const {
    return (t.rank == 4 ? batch * t.stride[0] : 0) + begin * row_stride(t) + head * t.stride[t.rank - 2];
  }
  static std::int64_t row_stride(const TensorView& t) { return t.stride[t.rank - 3]; }

  /// Offset in statistics, whose last two dimensions are [heads, rows].
  std::int64_t statistics_offset(const TensorView& t, std::int64_t head) const {
    return (t.rank == 3 ? batch * t.stride[0] : 0) + head * t.stride[t.rank - 2] + begin;
  }
};

struct Sequence {
  Span q, kv;
};

template <class Args>
std::vector<Sequence> sequences(const Args& a) {
  std::vector<Sequence> result;
  if (a.cu_seqlens_q) {
    const auto *q = a.cu_seqlens_q.template as<const std::int32_t>(),
               *kv = a.cu_seqlens_kv.template as<const std::int32_t>();
    for (std::int64_t b = 0; b + 1 < a.cu_seqlens_q.size(0); ++b)
      result.push_back({{b, q[b], q[b + 1] - q[b]}, {b, kv[b], kv[b + 1] - kv[b]}});
  } else {
    for (std::int64_t b = 0; b < a.q.size(0); ++b) result.push_back({{b, 0, a.q.size(1)}, {b, 0, a.k.size(1)}});
  }
  return result;
}

/// Multiply-adds of the forward pass.
template <class Args>
std::int64_t work_of(const Args& a, const std::vector<Sequence>& all) {
  std::int64_t pairs = 0;
  for (const Sequence& sequence : all) pairs += sequence.q.rows * sequence.kv.rows;
  return pairs * a.q.size(-2) * (a.q.size(-1) + a.v.size(-1));
}

/// The part of one sequence's queries in one head.
template <class Args>
attention::Head head_of(const Args& a, const Sequence& sequence, std::int64_t head, std::int64_t kv_head) {
  const auto matrix = [](const TensorView& t, const Span& span, std::int64_t h) {
    return rows_of(t, span.offset(t, h), Span::row_stride(t));
  };
  return {.q = matrix(a.q, sequence.q, head),
          .k = matrix(a.k, sequence.kv, kv_head),
          .v = matrix(a.v, sequence.kv, kv_head),
          .s_q = sequence.q.rows,
          .s_kv = sequence.kv.rows,
          .d_qk = a.q.size(-1),
          .d_v = a.v.size(-1),
          .softmax_scale = a.softmax_scale,
          .causal = a.causal};
}

/// Calls f(begin, end) for the rows of a packed tensor that belong to no sequence.
template <class F>
void outside(const TensorView& cu_seqlens, std::int64_t total, const F& f) {
  if (!cu_seqlens) return;
  f(0, cu_seqlens.as<const std::int32_t>()[0]);
  f(cu_seqlens.as<const std::int32_t>()[cu_seqlens.size(0) - 1], total);
}

/// Zeroes rows of a contiguous packed tensor.
void zero_rows(const TensorView& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t bytes = t.size(1) * t.size(2) * element_size(t.dtype);
  if (bytes > 0 && end > begin) std::memset(t.as<char>() + begin * bytes, 0, (end - begin) * bytes);
}

template <class A>
void forward(const FlashAttnArgs& a) {
  const std::int64_t h_q = a.q.size(-2), group = h_q / a.k.size(-2), d_v = a.v.size(-1);
  struct Block {
    Sequence sequence;
    std::int64_t begin, end;
  };
  std::vector<Block> blocks;
  const std::vector<Sequence> all = sequences(a);
  for (const Sequence& sequence : all) {
    for (std::int64_t q = 0; q < sequence.q.rows; q += attention::kQueryBlock)
      blocks.push_back({sequence, q, std::min(q + attention::kQueryBlock, sequence.q.rows)});
  }
  const std::int64_t units = static_cast<std::int64_t>(blocks.size()) * h_q;
  parallel_for(0, units, attention::head_grain(units, work_of(a, all)), [&](std::int64_t first, std::int64_t last) {
    const std::int64_t most_rows = std::max(attention::kQueryBlock, group);
    std::vector<A> out(most_rows * d_v), lse(most_rows);
    for (std::int64_t unit = first; unit < last; ++unit) {
      const auto& [sequence, begin, end] = blocks[unit / h_q];
      const std::int64_t h = unit % h_q;
      attention::Head head = head_of(a, sequence, h, h / group);
      A* const lse_out = a.lse.as<A>() + sequence.q.statistics_offset(a.lse, h);
      const std::int64_t out_offset = sequence.q.offset(a.out, h);
      if (sequence.q.rows > 1 || group == 1) {
        attention::attend(head, begin, end, out.data(), lse_out + begin);
        const std::int64_t stride = Span::row_stride(a.out);
        store_rows(out.data(), end - begin, d_v, a.out, out_offset + begin * stride, stride);
      } else if (h % group == 0) {
        // Decoding: the lone queries of a group of heads see the same keys, so they make the rows of one product.
        head.q.row_stride = a.q.stride[a.q.rank - 2];
        head.s_q = group;
        head.causal = false;
        attention::attend(head, 0, group, out.data(), lse.data());
        store_rows(out.data(), group, d_v, a.out, out_offset, d_v);
        for (std::int64_t g = 0; g < group; ++g) lse_out[g * a.lse.stride[a.lse.rank - 2]] = lse[g];
      }
    }
  });
  outside(a.cu_seqlens_q, a.q.size(0), [&](std::int64_t begin, std::int64_t end) {
    zero_rows(a.out, begin, end);
    for (std::int64_t h = 0; h < h_q; ++h) {
      A* const lse = a.lse.as<A>() + h * a.lse.stride[0];
      std::fill(lse + begin, lse + std::max(begin, end), -std::numeric_limits<A>::infinity());
    }
  });
}

template <class A>
void backward(const FlashAttnBackwardArgs& a) {
  const std::int64_t h_q = a.q.size(-2), h_kv = a.k.size(-2), group = h_q / h_kv;
  const std::int64_t d_qk = a.q.size(-1), d_v = a.v.size(-1);
  const std::vector<Sequence> all = sequences(a);
  const std::int64_t units = static_cast<std::int64_t>(all.size()) * h_kv;
  parallel_for(0, units, attention::head_grain(units, work_of(a, all)), [&](std::int64_t first, std::int64_t last) {
    std::vector<A> dq, dk, dv, delta, wide(2 * d_v);
    for (std::int64_t unit = first; unit < last; ++unit) {
      const Sequence& sequence = all[unit / h_kv];
      const std::int64_t kv_head = unit % h_kv;
      dk.assign(sequence.kv.rows * d_qk, A(0));
      dv.assign(sequence.kv.rows * d_v, A(0));
      for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const std::int64_t statistics = sequence.q.statistics_offset(a.lse, h), s_q = sequence.q.rows;
        const cpu::Matrix dout = rows_of(a.dout, sequence.q.offset(a.dout, h), Span::row_stride(a.dout));
        const cpu::Matrix out = rows_of(a.out, sequence.q.offset(a.out, h), Span::row_stride(a.out));
        delta.resize(s_q);
        for (std::int64_t i = 0; i < s_q; ++i) {
          cpu::widen(from(dout, i).data, dout.dtype, d_v, wide.data());
          cpu::widen(from(out, i).data, out.dtype, d_v, wide.data() + d_v);
          delta[i] = cpu::dot(wide.data(), wide.data() + d_v, d_v);
          if (a.dlse) delta[i] -= a.dlse.as<const A>()[statistics + i];
        }
        dq.assign(s_q * d_qk, A(0));
        attention::attend_backward(head_of(a, sequence, h, kv_head),
                                   attention::HeadGradient<A>{.dout = dout,
                                                              .lse = a.lse.as<const A>() + statistics,
                                                              .delta = delta.data(),
                                                              .dq = dq.data(),
                                                              .dk = dk.data(),
                                                              .dv = dv.data()});
        store_rows(dq.data(), s_q, d_qk, a.dq, sequence.q.offset(a.dq, h), Span::row_stride(a.dq));
      }
      store_rows(dk.data(), sequence.kv.rows, d_qk, a.dk, sequence.kv.offset(a.dk, kv_head), Span::row_stride(a.dk));
      store_rows(dv.data(), sequence.kv.rows, d_v, a.dv, sequence.kv.offset(a.dv, kv_head), Span::row_stride(a.dv));
    }
  });
  outside(a.cu_seqlens_q, a.q.size(0), [&](std::int64_t begin, std::int64_t end) { zero_rows(a.dq, begin, end); });
  outside(a.cu_seqlens_kv, a.k.size(0), [&](std::int64_t begin, std::int64_t end) {
    zero_rows(a.dk, begin, end);
    zero_rows(a.dv, begin, end);
  });
}

}  // namespace

void flash_attn_cpu(const FlashAttnArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void flash_attn_backward_cpu(const FlashAttnBackwardArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
