// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/quant.h"

namespace dsm {

void fp8_quantize_cpu(const Fp8QuantizeArgs& args, const Launch& launch);

}  // namespace dsm
