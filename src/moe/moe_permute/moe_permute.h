// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

void moe_permute_cpu(const MoePermuteArgs& args, const Launch& launch);

}  // namespace dsm
