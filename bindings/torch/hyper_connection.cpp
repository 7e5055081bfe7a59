// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/hyper_connection.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "bindings/torch/convert.h"

namespace dsm::binding {
namespace {

/// The operator refuses what does not fit, also what an int would cut off.
int as_int(std::int64_t number) {
  return static_cast<int>(std::clamp<std::int64_t>(number, -1, std::numeric_limits<int>::max()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hc_pre(const Tensor& x, const Tensor& fn, const Tensor& base,
                                                          const Tensor& scale, std::int64_t iterations, double eps,
                                                          double norm_eps, double post_mult) {
  const std::int64_t tokens = x.size(0), hc = x.size(1);
  const ScalarType wide = accumulator_dtype(x);
  Tensor mixed = empty(x, {tokens, x.size(2)}, x.scalar_type());
  Tensor post = empty(x, {tokens, hc}, wide);
  Tensor comb = empty(x, {tokens, hc, hc}, wide);
  Tensor mixes = empty(x, {tokens, (2 + hc) * hc}, wide);
  Tensor rstd = empty(x, {tokens}, wide);
  Call call(x);
  dsm::hc_pre({.x = view(x),
               .fn = view(fn),
               .base = view(base),
               .scale = view(scale),
               .iterations = as_int(iterations),
               .eps = eps,
               .norm_eps = norm_eps,
               .post_mult = post_mult,
               .mixed = view(mixed),
               .post = view(post),
               .comb = view(comb),
               .mixes = view(mixes),
               .rstd = view(rstd)},
              call.launch());
  return {mixed, post, comb, mixes, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hc_pre_backward(const Tensor& dmixed, const Tensor& dpost,
                                                           const Tensor& dcomb, const Tensor& x, const Tensor& fn,
                                                           const Tensor& base, const Tensor& scale,
                                                           std::int64_t iterations, double eps, double post_mult,
                                                           const Tensor& mixes, const Tensor& rstd) {
  Tensor dx = empty_like(x), dfn = empty_like(fn), dbase = empty_like(base), dscale = empty_like(scale);
  Call call(x);
  dsm::hc_pre_backward({.dmixed = view(dmixed),
                        .dpost = view(dpost),
                        .dcomb = view(dcomb),
                        .x = view(x),
                        .fn = view(fn),
                        .base = view(base),
                        .scale = view(scale),
                        .iterations = as_int(iterations),
                        .eps = eps,
                        .post_mult = post_mult,
                        .mixes = view(mixes),
                        .rstd = view(rstd),
                        .dx = view(dx),
                        .dfn = view(dfn),
                        .dbase = view(dbase),
                        .dscale = view(dscale)},
                       call.launch());
  return {dx, dfn, dbase, dscale};
}

Tensor hc_post(const Tensor& y, const Tensor& x, const Tensor& post, const Tensor& comb) {
  Tensor out = empty_like(x);
  Call call(x);
  dsm::hc_post({.y = view(y), .x = view(x), .post = view(post), .comb = view(comb), .out = view(out)}, call.launch());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hc_post_backward(const Tensor& dout, const Tensor& y, const Tensor& x,
                                                            const Tensor& post, const Tensor& comb) {
  Tensor dy = empty_like(y), dx = empty_like(x), dpost = empty_like(post), dcomb = empty_like(comb);
  Call call(x);
  dsm::hc_post_backward({.dout = view(dout),
                         .y = view(y),
                         .x = view(x),
                         .post = view(post),
                         .comb = view(comb),
                         .dy = view(dy),
                         .dx = view(dx),
                         .dpost = view(dpost),
                         .dcomb = view(dcomb)},
                        call.launch());
  return {dy, dx, dpost, dcomb};
}

std::tuple<Tensor, Tensor, Tensor> hc_head(const Tensor& x, const Tensor& fn, const Tensor& base, const Tensor& scale,
                                           double eps, double norm_eps) {
  const std::int64_t tokens = x.size(0);
  const ScalarType wide = accumulator_dtype(x);
  Tensor mixed = empty(x, {tokens, x.size(2)}, x.scalar_type());
  Tensor mixes = empty(x, {tokens, x.size(1)}, wide);
  Tensor rstd = empty(x, {tokens}, wide);
  Call call(x);
  dsm::hc_head({.x = view(x),
                .fn = view(fn),
                .base = view(base),
                .scale = view(scale),
                .eps = eps,
                .norm_eps = norm_eps,
                .mixed = view(mixed),
                .mixes = view(mixes),
                .rstd = view(rstd)},
               call.launch());
  return {mixed, mixes, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hc_head_backward(const Tensor& dmixed, const Tensor& x, const Tensor& fn,
                                                            const Tensor& base, const Tensor& scale, double eps,
                                                            const Tensor& mixes, const Tensor& rstd) {
  Tensor dx = empty_like(x), dfn = empty_like(fn), dbase = empty_like(base), dscale = empty_like(scale);
  Call call(x);
  dsm::hc_head_backward({.dmixed = view(dmixed),
                         .x = view(x),
                         .fn = view(fn),
                         .base = view(base),
                         .scale = view(scale),
                         .eps = eps,
                         .mixes = view(mixes),
                         .rstd = view(rstd),
                         .dx = view(dx),
                         .dfn = view(dfn),
                         .dbase = view(dbase),
                         .dscale = view(dscale)},
                        call.launch());
  return {dx, dfn, dbase, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def(
      "hc_pre(Tensor x, Tensor fn, Tensor base, Tensor scale, int iterations, float eps, float norm_eps, "
      "float post_mult) -> (Tensor mixed, Tensor post, Tensor comb, Tensor mixes, Tensor rstd)");
  m.def(
      "hc_pre_backward(Tensor dmixed, Tensor dpost, Tensor dcomb, Tensor x, Tensor fn, Tensor base, Tensor scale, "
      "int iterations, float eps, float post_mult, Tensor mixes, Tensor rstd) "
      "-> (Tensor dx, Tensor dfn, Tensor dbase, Tensor dscale)");
  m.def("hc_post(Tensor y, Tensor x, Tensor post, Tensor comb) -> Tensor");
  m.def(
      "hc_post_backward(Tensor dout, Tensor y, Tensor x, Tensor post, Tensor comb) "
      "-> (Tensor dy, Tensor dx, Tensor dpost, Tensor dcomb)");
  m.def(
      "hc_head(Tensor x, Tensor fn, Tensor base, Tensor scale, float eps, float norm_eps) "
      "-> (Tensor mixed, Tensor mixes, Tensor rstd)");
  m.def(
      "hc_head_backward(Tensor dmixed, Tensor x, Tensor fn, Tensor base, Tensor scale, float eps, Tensor mixes, "
      "Tensor rstd) -> (Tensor dx, Tensor dfn, Tensor dbase, Tensor dscale)");
}

#define DSM_IMPLEMENT(library)                                    \
  library.impl("hc_pre", TORCH_BOX(&hc_pre));                     \
  library.impl("hc_pre_backward", TORCH_BOX(&hc_pre_backward));   \
  library.impl("hc_post", TORCH_BOX(&hc_post));                   \
  library.impl("hc_post_backward", TORCH_BOX(&hc_post_backward)); \
  library.impl("hc_head", TORCH_BOX(&hc_head));                   \
  library.impl("hc_head_backward", TORCH_BOX(&hc_head_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
