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
  Call call(x, rms_norm_backward_workspace, args);
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

std::tuple<Tensor, Tensor> v4_q_norm_rope(const Tensor& q, const Tensor& positions, const Tensor& inv_freq,
                                          double eps) {
  Tensor y = empty_like(q);
  Tensor rstd = empty(q, {q.size(0), q.size(1)}, accumulator_dtype(q));
  Call call(q);
  dsm::v4_q_norm_rope({.q = view(q),
                       .positions = view(positions),
                       .inv_freq = view(inv_freq),
                       .eps = eps,
                       .y = view(y),
                       .rstd = view(rstd)},
                      call.launch());
  return {y, rstd};
}

Tensor v4_q_norm_rope_backward(const Tensor& dy, const Tensor& q, const Tensor& positions, const Tensor& inv_freq,
                               const Tensor& rstd) {
  Tensor dq = empty_like(q);
  Call call(q);
  dsm::v4_q_norm_rope_backward({.dy = view(dy),
                                .q = view(q),
                                .positions = view(positions),
                                .inv_freq = view(inv_freq),
                                .rstd = view(rstd),
                                .dq = view(dq)},
                               call.launch());
  return dq;
}

Tensor v4_output_projection(const Tensor& o, const Tensor& positions, const Tensor& inv_freq, const Tensor& wo_a,
                            std::int64_t groups) {
  Tensor z = empty(o, {o.size(0), wo_a.size(0)}, o.scalar_type());
  Call call(o);
  dsm::v4_output_projection({.o = view(o),
                             .positions = view(positions),
                             .inv_freq = view(inv_freq),
                             .wo_a = view(wo_a),
                             .groups = groups,
                             .z = view(z)},
                            call.launch());
  return z;
}

std::tuple<Tensor, Tensor> v4_output_projection_backward(const Tensor& dz, const Tensor& o, const Tensor& positions,
                                                         const Tensor& inv_freq, const Tensor& wo_a,
                                                         std::int64_t groups, bool need_do, bool need_dwo_a) {
  // As for rms_norm_backward: what is not wanted is empty.
  Tensor d_o = need_do ? empty_like(o) : empty(o, {0}, o.scalar_type());
  Tensor dwo_a = need_dwo_a ? empty_like(wo_a) : empty(wo_a, {0}, wo_a.scalar_type());
  Call call(o);
  dsm::v4_output_projection_backward({.dz = view(dz),
                                      .o = view(o),
                                      .positions = view(positions),
                                      .inv_freq = view(inv_freq),
                                      .wo_a = view(wo_a),
                                      .groups = groups,
                                      .d_o = need_do ? view(d_o) : TensorView(),
                                      .dwo_a = need_dwo_a ? view(dwo_a) : TensorView()},
                                     call.launch());
  return {d_o, dwo_a};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
  m.def("rope(Tensor x, Tensor positions, Tensor inv_freq, bool interleaved, bool inverse) -> Tensor");
  m.def(
      "rope_frequencies(int d_rope, float base, float factor, float original_length, float beta_fast, float beta_slow) "
      "-> Tensor");
  m.def("v4_q_norm_rope(Tensor q, Tensor positions, Tensor inv_freq, float eps) -> (Tensor y, Tensor rstd)");
  m.def("v4_q_norm_rope_backward(Tensor dy, Tensor q, Tensor positions, Tensor inv_freq, Tensor rstd) -> Tensor");
  m.def("v4_output_projection(Tensor o, Tensor positions, Tensor inv_freq, Tensor wo_a, int groups) -> Tensor");
  m.def(
      "v4_output_projection_backward(Tensor dz, Tensor o, Tensor positions, Tensor inv_freq, Tensor wo_a, int groups, "
      "bool need_do, bool need_dwo_a) -> (Tensor d_o, Tensor dwo_a)");
}

#define DSM_IMPLEMENT(library)                                                  \
  library.impl("rms_norm", TORCH_BOX(&rms_norm));                               \
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));             \
  library.impl("rope", TORCH_BOX(&rope));                                       \
  library.impl("v4_q_norm_rope", TORCH_BOX(&v4_q_norm_rope));                   \
  library.impl("v4_q_norm_rope_backward", TORCH_BOX(&v4_q_norm_rope_backward)); \
  library.impl("v4_output_projection", TORCH_BOX(&v4_output_projection));       \
  library.impl("v4_output_projection_backward", TORCH_BOX(&v4_output_projection_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m){
    DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CompositeExplicitAutograd, m) {
  m.impl("rope_frequencies", TORCH_BOX(&rope_frequencies));
}

}  // namespace dsm::binding
