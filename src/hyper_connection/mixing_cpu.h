// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/tiles.h"
#include "src/cpu/vector_math.h"
#include "src/hyper_connection/streams_cpu.h"
#include "src/numerics/scoring.h"

// What hc_pre and hc_head share on the CPU: the projection of a token's streams, its activations, and the streams'
// weighted sum. Args are those of either operator; output o of the projection has scale[min(o / hc, scales - 1)], and
// the first hc outputs make the weights.
namespace dsm::hyper_connection {

template <class Args>
Index scale_of(const Args& a, Index output) {
  return std::min(output / a.x.size(1), a.scale.size(0) - 1);
}

/// The activations of a token: mixes · scale + base.
template <class A, class Args>
void activate(const Args& a, Index token, A* activations) {
  const Index outputs = a.fn.size(0);
  const A* mixes = a.mixes.template as<const A>() + token * outputs;
  for (Index o = 0; o < outputs; ++o)
    activations[o] = mixes[o] * a.scale.template as<const A>()[scale_of(a, o)] + a.base.template as<const A>()[o];
}

/// Fills mixes, rstd and mixed, and calls finish(token, activations), which may overwrite the activations.
template <class A, class Args, class Finish>
void mix_streams(const Args& a, const Finish& finish) {
  const Index tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2), outputs = a.fn.size(0);
  A* const products = a.mixes.template as<A>();
  for (Index j = 0; j < hc; ++j)
    cpu::parallel_gemm<A>(tokens, outputs, hidden, 1, {row(a.x, 0, j), a.x.dtype, a.x.stride[0], 1},
                          transposed(a.fn.template as<const A>() + j * hidden, hc * hidden), j > 0, products, outputs);
  parallel_for(0, tokens, token_grain(hc * hidden), [&](Index begin, Index end) {
    std::vector<A> x(hc * hidden), mixed(hidden), activations(outputs), weights(hc);
    for (Index token = begin; token < end; ++token) {
      load_token(a.x, token, x.data());
      const A square = cpu::dot(x.data(), x.data(), hc * hidden) / static_cast<A>(hc * hidden);
      const A rstd = 1 / std::sqrt(square + static_cast<A>(a.norm_eps));
      a.rstd.template as<A>()[token] = rstd;
      cpu::scale(products + token * outputs, outputs, rstd);
      activate(a, token, activations.data());
      for (Index j = 0; j < hc; ++j) weights[j] = sigmoid(activations[j]) + static_cast<A>(a.eps);
      cpu::gemm<A>(1, hidden, hc, 1, matrix(weights.data(), hc), matrix(x.data(), hidden), 0, mixed.data(), hidden);
      store_token(mixed.data(), a.mixed, token);
      finish(token, activations.data());
    }
  });
}

/// Gradients of the base, and of the scales by way of the mixes, from those of the activations [tokens, outputs]: sums
/// over the tokens one after another, in double.
template <class A, class Args>
void sum_activation_gradients(const Args& a, const A* dactivations) {
  const Index tokens = a.x.size(0), outputs = a.fn.size(0);
  std::vector<double> dbase(outputs), dscale(a.scale.size(0));
  for (Index token = 0; token < tokens; ++token)
    for (Index o = 0; o < outputs; ++o) {
      const A d = dactivations[token * outputs + o];
      dbase[o] += d;
      dscale[scale_of(a, o)] += static_cast<double>(d) * a.mixes.template as<const A>()[token * outputs + o];
    }
  for (Index o = 0; o < outputs; ++o) a.dbase.template as<A>()[o] = static_cast<A>(dbase[o]);
  for (Index s = 0; s < a.scale.size(0); ++s) a.dscale.template as<A>()[s] = static_cast<A>(dscale[s]);
}

/// dx[j] = weights[j] · dmixed + dproducts · fn[j] − pull · x[j] for every token.
template <class A, class Args>
void stream_gradients(const Args& a, const A* weights, const A* dproducts, const A* pull) {
  constexpr Index kTileTokens = 96, kTileColumns = 512;
  const Index tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2), outputs = a.fn.size(0);
  cpu::over_tiles(std::vector<cpu::Extent>(hc, {tokens, hidden}), kTileTokens, kTileColumns, [&](const cpu::Tile& t) {
    const Index j = t.matrix, element = static_cast<Index>(element_size(a.x.dtype));
    A* const sums = cpu::tile_scratch<A>((t.rows + 2) * t.columns);
    A *const x = sums + t.rows * t.columns, *const dmixed = x + t.columns;
    const A* fn = a.fn.template as<const A>() + j * hidden + t.column;
    cpu::gemm<A>(t.rows, t.columns, outputs, 1, matrix(dproducts + t.row * outputs, outputs), matrix(fn, hc * hidden),
                 0, sums, t.columns);
    for (Index r = 0; r < t.rows; ++r) {
      const Index token = t.row + r;
      const A weight = weights[token * hc + j], back = pull[token];
      A* const sum = sums + r * t.columns;
      cpu::widen(row(a.x, token, j) + t.column * element, a.x.dtype, t.columns, x);
      cpu::widen(row(a.dmixed, token) + t.column * element, a.x.dtype, t.columns, dmixed);
      for (Index i = 0; i < t.columns; ++i) sum[i] += weight * dmixed[i] - back * x[i];
      cpu::narrow(sum, t.columns, row(a.dx, token, j) + t.column * element, a.x.dtype);
    }
  });
}

/// All gradients. finish(token, activations) turns the activations behind the first hc into their gradients.
template <class A, class Args, class Finish>
void mix_streams_backward(const Args& a, const Finish& finish) {
  const Index tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2), outputs = a.fn.size(0);
  std::vector<A> dactivations(tokens * outputs), dproducts(tokens * outputs), weights(tokens * hc), pull(tokens);
  parallel_for(0, tokens, token_grain(hc * hidden), [&](Index begin, Index end) {
    std::vector<A> x(hc * hidden), dmixed(hidden);
    for (Index token = begin; token < end; ++token) {
      load_token(a.x, token, x.data());
      load_token(a.dmixed, token, dmixed.data());
      A* const d = dactivations.data() + token * outputs;
      activate(a, token, d);
      for (Index j = 0; j < hc; ++j) {
        weights[token * hc + j] = sigmoid(d[j]) + static_cast<A>(a.eps);
        d[j] = cpu::dot(x.data() + j * hidden, dmixed.data(), hidden) * sigmoid_derivative(d[j]);
      }
      finish(token, d);
      // With p = x · fnᵀ, mixes = p · rstd: dp = dmixes · rstd, and drstd = Σ dmixes · p pulls all of x.
      const A* mixes = a.mixes.template as<const A>() + token * outputs;
      const A rstd = a.rstd.template as<const A>()[token];
      A dot = 0;
      for (Index o = 0; o < outputs; ++o) {
        const A dmix = d[o] * a.scale.template as<const A>()[scale_of(a, o)];
        dproducts[token * outputs + o] = dmix * rstd;
        dot += dmix * mixes[o];
      }
      pull[token] = dot / static_cast<A>(hc * hidden) * rstd * rstd;
    }
  });
  sum_activation_gradients(a, dactivations.data());
  if (tokens == 0) {
    std::fill_n(a.dfn.template as<A>(), a.dfn.numel(), A(0));
    return;
  }
  stream_gradients(a, weights.data(), dproducts.data(), pull.data());
  for (Index j = 0; j < hc; ++j)
    cpu::parallel_gemm<A>(outputs, hidden, tokens, 1, transposed(dproducts.data(), outputs),
                          {row(a.x, 0, j), a.x.dtype, a.x.stride[0], 1}, 0, a.dfn.template as<A>() + j * hidden,
                          hc * hidden);
}

}  // namespace dsm::hyper_connection
