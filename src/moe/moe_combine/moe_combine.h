// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

void moe_combine_cpu(const MoeCombineArgs& args, const Launch& launch);
void moe_combine_backward_cpu(const MoeCombineBackwardArgs& args, const Launch& launch);

}  // namespace dsm
