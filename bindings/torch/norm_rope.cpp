// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/norm_rope.h"

#include <tuple>

#include "bindings/torch/convert.h"

namespace dsm::binding {
namespace {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps) {
  Tensor y = empty_like(x);
  Tensor rstd = empty(x, {x.size(0)}, accumulator_dtype(x));
  Call call(x);
  dsm::rms_norm({.x = view(x), .weight = view(weight), .eps = eps, .y = view(y), .rstd = view(rstd)}, call.launch());
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight,
                                             const Tensor& rstd) {
  Tensor dx = empty_like(x);
  // A schema cannot return an optional tensor that Python understands everywhere: without a weight it is empty.
  Tensor dweight = weight ? empty_like(*weight) : empty(x, {0}, x.scalar_type());
  const RmsNormBackwardArgs args{.dy = view(dy),
                                 .x = view(x),
                                 .weight = view(weight),
                                 .rstd = view(rstd),
                                 .dx = view(dx),
                                 .dweight = weight ? view(dweight) : TensorView()};
  Call call(x, rms_norm_backward_workspace(args));
  dsm::rms_norm_backward(args, call.launch());
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
}

#define DSM_IMPLEMENT(library)                    \
  library.impl("rms_norm", TORCH_BOX(&rms_norm)); \
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
