// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/quant_linear.h"

#include <string>

#include "bindings/torch/convert.h"
#include "bindings/torch/weights.h"

namespace dsm::binding {
namespace {

Tensor forward(const char* name, void (*run)(const QuantLinearArgs&, const Launch&), const Tensor& x,
               const Tensor& weight, const BlockScales& scales, const std::string& activation_format) {
  Tensor y = empty(x, {extent(name, "x", x, 0, 2), extent(name, "weight", weight, 0, 2)}, x.scalar_type());
  Call call(x);
  run({.x = view(x),
       .weight = view(weight),
       .scales = scales,
       .activation_format = activation_format_named(name, activation_format),
       .y = view(y)},
      call.launch());
  return y;
}

Tensor backward(const char* name, void (*run)(const QuantLinearBackwardArgs&, const Launch&), const Tensor& dy,
                const Tensor& weight, const BlockScales& scales, std::int64_t codes_in_byte) {
  Tensor dx =
      empty(dy, {extent(name, "dy", dy, 0, 2), extent(name, "weight", weight, 1, 2) * codes_in_byte}, dy.scalar_type());
  Call call(dy);
  run({.dy = view(dy), .weight = view(weight), .scales = scales, .dx = view(dx)}, call.launch());
  return dx;
}

Tensor fp8_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, std::vector<std::int64_t> block,
                  const std::string& activation_format) {
  return forward("fp8_linear", dsm::fp8_linear, x, weight, block_scales("fp8_linear", scales, std::nullopt, block),
                 activation_format);
}

Tensor fp8_linear_backward(const Tensor& dy, const Tensor& weight, const Tensor& scales,
                           std::vector<std::int64_t> block) {
  return backward("fp8_linear_backward", dsm::fp8_linear_backward, dy, weight,
                  block_scales("fp8_linear_backward", scales, std::nullopt, block), 1);
}

Tensor fp4_linear(const Tensor& x, const Tensor& packed, const Tensor& scales,
                  const std::optional<Tensor>& global_scale, const std::string& activation_format) {
  return forward("fp4_linear", dsm::fp4_linear, x, packed, block_scales("fp4_linear", scales, global_scale, {}),
                 activation_format);
}

Tensor fp4_linear_backward(const Tensor& dy, const Tensor& packed, const Tensor& scales,
                           const std::optional<Tensor>& global_scale) {
  return backward("fp4_linear_backward", dsm::fp4_linear_backward, dy, packed,
                  block_scales("fp4_linear_backward", scales, global_scale, {}), 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("fp8_linear(Tensor x, Tensor weight, Tensor scales, SymInt[] block, str activation_format) -> Tensor y");
  m.def("fp8_linear_backward(Tensor dy, Tensor weight, Tensor scales, SymInt[] block) -> Tensor dx");
  m.def("fp4_linear(Tensor x, Tensor packed, Tensor scales, Tensor? global_scale, str activation_format) -> Tensor y");
  m.def("fp4_linear_backward(Tensor dy, Tensor packed, Tensor scales, Tensor? global_scale) -> Tensor dx");
}

#define DSM_IMPLEMENT(library)                                          \
  library.impl("fp8_linear", TORCH_BOX(&fp8_linear));                   \
  library.impl("fp8_linear_backward", TORCH_BOX(&fp8_linear_backward)); \
  library.impl("fp4_linear", TORCH_BOX(&fp4_linear));                   \
  library.impl("fp4_linear_backward", TORCH_BOX(&fp4_linear_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
