// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

void grouped_gemm_cpu(const GroupedGemmArgs& args, const Launch& launch);
void grouped_gemm_backward_cpu(const GroupedGemmBackwardArgs& args, const Launch& launch);

}  // namespace dsm
