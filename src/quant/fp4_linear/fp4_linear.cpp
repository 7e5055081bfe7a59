// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/fp4_linear/fp4_linear.h"

#include "src/core/registry.h"
#include "src/quant/quant_linear.h"

namespace dsm {
namespace {

const Operator<QuantLinearArgs> forward("quant", "fp4_linear", {{"cpu", DeviceType::cpu, fp4_linear_cpu}});
const Operator<QuantLinearBackwardArgs> backward("quant", "fp4_linear_backward",
                                                 {{"cpu", DeviceType::cpu, fp4_linear_backward_cpu}});

}  // namespace

void fp4_linear(const QuantLinearArgs& a, const Launch& launch) {
  check_quant_linear(Check("fp4_linear"), a, {DType::uint8, DType::int8});
  if (a.y.numel() == 0) return;
  forward(a, a.x.device, launch);
}

void fp4_linear_backward(const QuantLinearBackwardArgs& a, const Launch& launch) {
  check_quant_linear(Check("fp4_linear_backward"), a, {DType::uint8, DType::int8});
  if (a.dx.numel() == 0) return;
  backward(a, a.dy.device, launch);
}

}  // namespace dsm
