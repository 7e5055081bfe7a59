// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/hyper_connection/hc_pre/hc_pre.h"
#include "src/hyper_connection/mixing_cpu.h"
#include "src/numerics/sinkhorn.h"

namespace dsm {
namespace {

using namespace hyper_connection;

template <class A>
void row_softmax(A* c, int hc) {
  for (A* row = c; row < c + hc * hc; row += hc) {
    const A sum = cpu::exp_scaled<A>(row, hc, 1, cpu::max(row, hc));
    for (int k = 0; k < hc; ++k) row[k] /= sum;
  }
}

template <class A>
void forward(const HcPreArgs& a) {
  const int hc = static_cast<int>(a.x.size(1));
  mix_streams<A>(a, [&](Index token, A* activations) {
    A* const post = a.post.as<A>() + token * hc;
    for (int j = 0; j < hc; ++j) post[j] = static_cast<A>(a.post_mult) * sigmoid(activations[hc + j]);
    A* const comb = a.comb.as<A>() + token * hc * hc;
    std::copy_n(activations + 2 * hc, hc * hc, comb);
    row_softmax(comb, hc);
    for (int i = 0; i < hc * hc; ++i) comb[i] += static_cast<A>(a.eps);
    sinkhorn(comb, hc, a.iterations, static_cast<A>(a.eps));
  });
}

template <class A>
void backward(const HcPreBackwardArgs& a) {
  const int hc = static_cast<int>(a.x.size(1));
  mix_streams_backward<A>(a, [&](Index token, A* activations) {
    const A* dpost = a.dpost.as<const A>() + token * hc;
    for (int j = 0; j < hc; ++j)
      activations[hc + j] = static_cast<A>(a.post_mult) * dpost[j] * sigmoid_derivative(activations[hc + j]);
    A* const softmax = activations + 2 * hc;
    row_softmax(softmax, hc);
    // The softmax with eps, its gradient, and the record of the iterations.
    A* const comb = cpu::tile_scratch<A>(2 * hc * hc + sinkhorn_record_size(hc, a.iterations));
    A *const dcomb = comb + hc * hc, *const record = dcomb + hc * hc;
    for (int i = 0; i < hc * hc; ++i) comb[i] = softmax[i] + static_cast<A>(a.eps);
    std::copy_n(a.dcomb.as<const A>() + token * hc * hc, hc * hc, dcomb);
    sinkhorn(comb, hc, a.iterations, static_cast<A>(a.eps), record);
    sinkhorn_backward(record, hc, a.iterations, dcomb);
    for (int j = 0; j < hc * hc; j += hc) {
      const A dot = cpu::dot(softmax + j, dcomb + j, hc);
      for (int i = j; i < j + hc; ++i) softmax[i] *= dcomb[i] - dot;
    }
  });
}

}  // namespace

void hc_pre_cpu(const HcPreArgs& args, const Launch&) {
  visit_wide(args.x, [&]<class A>() { forward<A>(args); });
}

void hc_pre_backward_cpu(const HcPreBackwardArgs& args, const Launch&) {
  visit_wide(args.x, [&]<class A>() { backward<A>(args); });
}

}  // namespace dsm
