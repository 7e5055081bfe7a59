// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/quant.h"

namespace dsm {

void nvfp4_quantize_cpu(const Nvfp4QuantizeArgs& args, const Launch& launch);

}  // namespace dsm
