// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/norm_rope.h"

namespace dsm {

void rope_cpu(const RopeArgs& args, const Launch& launch);
void rope_cuda(const RopeArgs& args, const Launch& launch);

}  // namespace dsm
