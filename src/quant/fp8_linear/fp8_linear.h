// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/quant_linear.h"

namespace dsm {

void fp8_linear_cpu(const QuantLinearArgs& args, const Launch& launch);
void fp8_linear_backward_cpu(const QuantLinearBackwardArgs& args, const Launch& launch);

}  // namespace dsm
