// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/fp8_linear/fp8_linear.h"

#include "src/core/registry.h"
#include "src/quant/quant_linear.h"

namespace dsm {
namespace {

const Operator<QuantLinearArgs> forward("quant", "fp8_linear", {{"cpu", DeviceType::cpu, fp8_linear_cpu}});
const Operator<QuantLinearBackwardArgs> backward("quant", "fp8_linear_backward",
                                                 {{"cpu", DeviceType::cpu, fp8_linear_backward_cpu}});

}  // namespace

void fp8_linear(const QuantLinearArgs& a, const Launch& launch) {
  check_quant_linear(Check("fp8_linear"), a, {DType::float8_e4m3fn});
  if (a.y.numel() == 0) return;
  forward(a, a.x.device, launch);
}

void fp8_linear_backward(const QuantLinearBackwardArgs& a, const Launch& launch) {
  check_quant_linear(Check("fp8_linear_backward"), a, {DType::float8_e4m3fn});
  if (a.dx.numel() == 0) return;
  backward(a, a.dy.device, launch);
}

}  // namespace dsm
