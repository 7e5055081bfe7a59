// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/norm_rope.h"

namespace dsm {

void v4_output_projection_cpu(const V4OutputProjectionArgs& args, const Launch& launch);
void v4_output_projection_backward_cpu(const V4OutputProjectionBackwardArgs& args, const Launch& launch);

}  // namespace dsm
