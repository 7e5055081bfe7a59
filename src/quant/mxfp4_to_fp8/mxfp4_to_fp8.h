// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/quant.h"

namespace dsm {

void mxfp4_to_fp8_cpu(const Mxfp4ToFp8Args& args, const Launch& launch);

}  // namespace dsm
