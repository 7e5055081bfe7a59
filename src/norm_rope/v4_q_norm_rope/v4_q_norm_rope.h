// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/norm_rope.h"

namespace dsm {

void v4_q_norm_rope_cpu(const V4QNormRopeArgs& args, const Launch& launch);
void v4_q_norm_rope_backward_cpu(const V4QNormRopeBackwardArgs& args, const Launch& launch);

}  // namespace dsm
