// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/weights.h"
#include "src/quant/fp4_linear/fp4_linear.h"

namespace dsm {

void fp4_linear_cpu(const QuantLinearArgs& a, const Launch&) {
  cpu::multiply_rows(a.x, {a.weight, a.scales}, true, a.activation_format, {0, a.x.size(0)}, a.y);
}

void fp4_linear_backward_cpu(const QuantLinearBackwardArgs& a, const Launch&) {
  cpu::multiply_rows(a.dy, {a.weight, a.scales}, false, ActivationFormat::none, {0, a.dy.size(0)}, a.dx);
}

}  // namespace dsm
