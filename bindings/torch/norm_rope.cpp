// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/norm_rope.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

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

Tensor rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, bool interleaved, bool inverse) {
  Tensor y = empty_like(x);
  Call call(x);
  dsm::rope({.x = view(x),
             .positions = view(positions),
             .inv_freq = view(inv_freq),
             .interleaved = interleaved,
             .inverse = inverse,
             .y = view(y)},
            call.launch());
  return y;
}

Tensor rope_frequencies(std::int64_t d_rope, double base, double factor, double original_length, double beta_fast,
                        double beta_slow) {
  if (d_rope < 0 || d_rope % 2 != 0)
    throw Error("rope_frequencies", "d_rope", "an even number of at least 0", std::to_string(d_rope));
  Tensor inv_freq = empty_on_cpu({d_rope / 2}, ScalarType::Float);
  dsm::rope_frequencies({.base = base,
                         .factor = factor,
                         .original_length = original_length,
                         .beta_fast = beta_fast,
                         .beta_slow = beta_slow,
                         .inv_freq = view(inv_freq)});
  return inv_freq;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
  m.def("rope(Tensor x, Tensor positions, Tensor inv_freq, bool interleaved, bool inverse) -> Tensor");
  m.def(
      "rope_frequencies(int d_rope, float base, float factor, float original_length, float beta_fast, float beta_slow) "
      "-> Tensor");
}

#define DSM_IMPLEMENT(library)                                      \
  library.impl("rms_norm", TORCH_BOX(&rms_norm));                   \
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward)); \
  library.impl("rope", TORCH_BOX(&rope));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m){
    DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CompositeExplicitAutograd, m) {
  m.impl("rope_frequencies", TORCH_BOX(&rope_frequencies));
}

}  // namespace dsm::binding
