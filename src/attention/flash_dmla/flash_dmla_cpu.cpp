// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <vector>

#include "src/attention/attend_cpu.h"
#include "src/attention/flash_dmla/flash_dmla.h"
#include "src/cpu/convert.h"
#include "src/cpu/vector_math.h"

namespace dsm {
namespace {

using attention::rows_of;
using attention::transposed;

/// One head, [rows, d], of a [batch, heads, rows, d] tensor.
cpu::Matrix head_of(const TensorView& t, std::int64_t batch, std::int64_t head) {
  return rows_of(t, batch * t.stride[0] + head * t.stride[1], t.stride[2]);
}

cpu::Matrix weight_of(const TensorView& t) { return rows_of(t, 0, t.stride[0]); }

/// Rounds values [rows, d] into one head of a contiguous [batch, heads, rows, d] tensor, from row `begin` on.
template <class A>
void store_head(const A* values, std::int64_t rows, const TensorView& t, std::int64_t batch, std::int64_t head,
                std::int64_t begin = 0) {
  const std::int64_t d = t.size(3);
  attention::store_rows(values, rows, d, t, ((batch * t.size(1) + head) * t.size(2) + begin) * d, d);
}

/// out[m,n] = A[m,k] B[k,n]. The product's memory is kept from call to call.
template <class A>
cpu::Matrix product(std::vector<A>& out, std::int64_t m, std::int64_t n, std::int64_t k, const cpu::Matrix& a,
                    const cpu::Matrix& b) {
  if (static_cast<std::int64_t>(out.size()) < m * n) out.resize(m * n);
  const auto multiply = num_threads() == 1 ? cpu::gemm<A> : cpu::parallel_gemm<A>;
  multiply(m, n, k, A(1), a, b, A(0), out.data(), n);
  return rows_of(out.data(), n);
}

/// q', k' and v' of one head at a time, computed unless the arguments hold them already.
template <class A>
class LatentHead {
 public:
  template <class Args>
  attention::Head operator()(const Args& a, std::int64_t batch, std::int64_t h) {
    const std::int64_t s_q = a.q.size(2), s_kv = a.k.size(2), d_latent = a.latent.size(3);
    attention::Head head{.q = head_of(a.q, batch, h),
                         .k = head_of(a.k, batch, h),
                         .v = head_of(a.v, batch, h),
                         .s_q = s_q,
                         .s_kv = s_kv,
                         .d_qk = d_latent,
                         .d_v = d_latent,
                         .softmax_scale = a.softmax_scale,
                         .causal = a.causal};
    if (a.wk) head.q = product(q_, s_q, d_latent, a.q.size(3), head.q, weight_of(a.wk));
    if (a.cache_is_latent) return head;
    head.k = product(k_, s_kv, d_latent, a.k.size(3), head.k, weight_of(a.wk));
    head.v = product(v_, s_kv, d_latent, a.v.size(3), head.v, weight_of(a.wv));
    return head;
  }

 private:
  std::vector<A> q_, k_, v_;
};

/// Multiply-adds of attention and projections in the forward pass.
template <class Args>
std::int64_t work_of(const Args& a) {
  const std::int64_t heads = a.q.size(0) * a.q.size(1), s_q = a.q.size(2), s_kv = a.k.size(2);
  const std::int64_t projected = s_q * a.q.size(3) + (a.cache_is_latent ? 0 : s_kv * (a.k.size(3) + a.v.size(3)));
  return heads * a.latent.size(3) * (2 * s_q * s_kv + projected);
}

template <class A>
void forward(const FlashDmlaArgs& a) {
  const std::int64_t heads = a.q.size(1), all_heads = a.q.size(0) * heads, s_q = a.q.size(2),
                     d_latent = a.latent.size(3);
  const std::int64_t blocks = (s_q + attention::kQueryBlock - 1) / attention::kQueryBlock;
  parallel_for(0, all_heads, attention::head_grain(all_heads, work_of(a)), [&](std::int64_t first, std::int64_t last) {
    LatentHead<A> latent_head;
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t batch = unit / heads, h = unit % heads;
      const attention::Head head = latent_head(a, batch, h);
      parallel_for(0, blocks, 1, [&](std::int64_t first_block, std::int64_t last_block) {
        std::vector<A> latent(std::min(s_q, attention::kQueryBlock) * d_latent), out;
        for (std::int64_t block = first_block; block < last_block; ++block) {
          const std::int64_t begin = block * attention::kQueryBlock;
          const std::int64_t end = std::min(begin + attention::kQueryBlock, s_q), rows = end - begin;
          attention::attend(head, begin, end, latent.data(), a.lse.as<A>() + unit * s_q + begin);
          store_head(latent.data(), rows, a.latent, batch, h, begin);
          if (!a.out) continue;
          product(out, rows, a.wv.size(0), d_latent, rows_of(latent.data(), d_latent), transposed(weight_of(a.wv)));
          store_head(out.data(), rows, a.out, batch, h, begin);
        }
      });
    }
  });
}

/// Gradient of a weight: a sum over all heads that does not depend on which thread adds what. Each of a fixed number
/// of parts adds up a range of heads, and the parts are added in order.
template <class A>
class WeightGradient {
 public:
  WeightGradient(const TensorView& out, std::int64_t parts) : out_(out), parts_(parts), sums_(parts * out.numel()) {}

  /// Adds a[rows, d]ᵀ b[rows, d_latent] to a part.
  void add(std::int64_t part, std::int64_t rows, const cpu::Matrix& a, const cpu::Matrix& b) {
    const std::int64_t d = out_.size(0), d_latent = out_.size(1);
    cpu::gemm<A>(d, d_latent, rows, A(1), transposed(a), b, A(1), sums_.data() + part * d * d_latent, d_latent);
  }

  void store() {
    const std::int64_t n = out_.numel();
    if (n == 0) return;
    std::vector<double> sum(n);
    for (std::int64_t part = 0; part < parts_; ++part)
      for (std::int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(sums_[part * n + i]);
    cpu::narrow(sum.data(), n, out_.data, out_.dtype);
  }

 private:
  const TensorView& out_;
  std::int64_t parts_;
  std::vector<A> sums_;
};

template <class A>
void backward(const FlashDmlaBackwardArgs& a) {
  constexpr std::int64_t kMaxParts = 256;  // bounds the memory of the weights' partial sums
  const std::int64_t heads = a.q.size(1), all_heads = a.q.size(0) * heads, parts = std::min(all_heads, kMaxParts);
  const std::int64_t s_q = a.q.size(2), s_kv = a.k.size(2), d_latent = a.latent.size(3);
  WeightGradient<A> dwk(a.dwk, parts), dwv(a.dwv, parts);
  parallel_for(0, parts, attention::head_grain(parts, work_of(a)), [&](std::int64_t first, std::int64_t last) {
    LatentHead<A> latent_head;
    std::vector<A> dlatent(s_q * d_latent), delta(s_q), wide(d_latent), dq, dk, dv, projected;
    for (std::int64_t part = first; part < last; ++part) {
      for (std::int64_t unit = part * all_heads / parts; unit < (part + 1) * all_heads / parts; ++unit) {
        const std::int64_t batch = unit / heads, h = unit % heads;
        const attention::Head head = latent_head(a, batch, h);
        const cpu::Matrix latent = head_of(a.latent, batch, h);

        // dlatent' and delta
        std::fill(dlatent.begin(), dlatent.end(), A(0));
        if (a.dlatent) {
          const cpu::Matrix given = head_of(a.dlatent, batch, h);
          for (std::int64_t i = 0; i < s_q; ++i)
            cpu::widen(attention::from(given, i).data, given.dtype, d_latent, dlatent.data() + i * d_latent);
        }
        if (a.dout) {
          const cpu::Matrix dout = head_of(a.dout, batch, h);
          cpu::gemm<A>(s_q, d_latent, a.wv.size(0), A(1), dout, weight_of(a.wv), A(1), dlatent.data(), d_latent);
          dwv.add(part, s_q, dout, latent);
        }
        for (std::int64_t i = 0; i < s_q; ++i) {
          cpu::widen(attention::from(latent, i).data, latent.dtype, d_latent, wide.data());
          delta[i] = cpu::dot(dlatent.data() + i * d_latent, wide.data(), d_latent);
          if (a.dlse) delta[i] -= a.dlse.as<const A>()[unit * s_q + i];
        }

        dq.assign(s_q * d_latent, A(0));
        dk.assign(s_kv * d_latent, A(0));
        dv.assign(s_kv * d_latent, A(0));
        attention::attend_backward(head, attention::HeadGradient<A>{.dout = rows_of(dlatent.data(), d_latent),
                                                                    .lse = a.lse.as<const A>() + unit * s_q,
                                                                    .delta = delta.data(),
                                                                    .dq = dq.data(),
                                                                    .dk = dk.data(),
                                                                    .dv = dv.data()});

        // Back through the projections: the gradient of x in x' = x w is dx' wᵀ, that of w is xᵀ dx'.
        const auto unproject = [&](const std::vector<A>& d_projected, const TensorView& x, const TensorView& weight,
                                   WeightGradient<A>& dweight, const TensorView& dx) {
          const std::int64_t rows = x.size(2);
          const cpu::Matrix d = rows_of(d_projected.data(), d_latent);
          product(projected, rows, x.size(3), d_latent, d, transposed(weight_of(weight)));
          store_head(projected.data(), rows, dx, batch, h);
          dweight.add(part, rows, head_of(x, batch, h), d);
        };
        if (a.wk) {
          unproject(dq, a.q, a.wk, dwk, a.dq);
        } else {
          store_head(dq.data(), s_q, a.dq, batch, h);
        }
        if (a.cache_is_latent) {
          store_head(dk.data(), s_kv, a.dk, batch, h);
          store_head(dv.data(), s_kv, a.dv, batch, h);
        } else {
          unproject(dk, a.k, a.wk, dwk, a.dk);
          unproject(dv, a.v, a.wv, dwv, a.dv);
        }
      }
    }
  });
  dwk.store();
  dwv.store();
}

}  // namespace

void flash_dmla_cpu(const FlashDmlaArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void flash_dmla_backward_cpu(const FlashDmlaBackwardArgs& args, const Launch&) {
  args.q.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace dsm
