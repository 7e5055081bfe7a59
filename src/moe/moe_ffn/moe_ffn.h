// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

void moe_ffn_cpu(const MoeFfnArgs& args, const Launch& launch);
void moe_ffn_backward_cpu(const MoeFfnBackwardArgs& args, const Launch& launch);

}  // namespace dsm
