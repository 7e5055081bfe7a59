// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/quant.h"

namespace dsm {

void mxfp4_quantize_cpu(const Mxfp4QuantizeArgs& args, const Launch& launch);

}  // namespace dsm
