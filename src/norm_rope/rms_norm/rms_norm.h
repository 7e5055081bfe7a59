// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/norm_rope.h"

namespace dsm {

void rms_norm_cpu(const RmsNormArgs& args, const Launch& launch);
void rms_norm_backward_cpu(const RmsNormBackwardArgs& args, const Launch& launch);

}  // namespace dsm
