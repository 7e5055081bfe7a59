// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/quant_linear.h"
#include "src/core/checks.h"

namespace dsm {

/// What fp8_linear and fp4_linear check alike; `codes` are the dtypes of the weight.
void check_quant_linear(const Check& check, const QuantLinearArgs& args, Check::DTypes codes);
void check_quant_linear(const Check& check, const QuantLinearBackwardArgs& args, Check::DTypes codes);

}  // namespace dsm
