// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/vector_math.h"
#include "src/hyper_connection/hc_post/hc_post.h"
#include "src/hyper_connection/streams_cpu.h"

namespace dsm {
namespace {

using namespace hyper_connection;

template <class A>
void forward(const HcPostArgs& a) {
  const Index tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2);
  parallel_for(0, tokens, token_grain(hc * hidden), [&](Index begin, Index end) {
    std::vector<A> y(hidden), out(hc * hidden);
    for (Index token = begin; token < end; ++token) {
      load_token(a.y, token, y.data());
      const A *post = a.post.as<const A>() + token * hc, *comb = a.comb.as<const A>() + token * hc * hc;
      for (Index k = 0; k < hc; ++k)
        for (Index i = 0; i < hidden; ++i) out[k * hidden + i] = post[k] * y[i];
      cpu::gemm<A>(hc, hidden, hc, 1, transposed(comb, hc), {row(a.x, token), a.x.dtype, a.x.stride[1], 1}, 1,
                   out.data(), hidden);
      store_token(out.data(), a.out, token);
    }
  });
}

template <class A>
void backward(const HcPostBackwardArgs& a) {
  const Index tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2);
  parallel_for(0, tokens, token_grain(hc * hidden), [&](Index begin, Index end) {
    std::vector<A> dout(hc * hidden), x(hc * hidden), y(hidden);
    for (Index token = begin; token < end; ++token) {
      load_token(a.dout, token, dout.data());
      load_token(a.x, token, x.data());
      load_token(a.y, token, y.data());
      A *const dpost = a.dpost.as<A>() + token * hc, *const dcomb = a.dcomb.as<A>() + token * hc * hc;
      for (Index k = 0; k < hc; ++k) {
        const A* d = dout.data() + k * hidden;
        dpost[k] = cpu::dot(d, y.data(), hidden);
        for (Index j = 0; j < hc; ++j) dcomb[j * hc + k] = cpu::dot(d, x.data() + j * hidden, hidden);
      }
      const A *post = a.post.as<const A>() + token * hc, *comb = a.comb.as<const A>() + token * hc * hc;
      const cpu::Matrix gradient = matrix(dout.data(), hidden);
      cpu::gemm<A>(1, hidden, hc, 1, matrix(post, hc), gradient, 0, y.data(), hidden);
      store_token(y.data(), a.dy, token);
      cpu::gemm<A>(hc, hidden, hc, 1, matrix(comb, hc), gradient, 0, x.data(), hidden);
      store_token(x.data(), a.dx, token);
    }
  });
}

}  // namespace

void hc_post_cpu(const HcPostArgs& args, const Launch&) {
  visit_wide(args.x, [&]<class A>() { forward<A>(args); });
}

void hc_post_backward_cpu(const HcPostBackwardArgs& args, const Launch&) {
  visit_wide(args.x, [&]<class A>() { backward<A>(args); });
}

}  // namespace dsm
