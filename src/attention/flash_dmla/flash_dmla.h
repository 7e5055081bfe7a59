// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/attention.h"

namespace dsm {

void flash_dmla_cpu(const FlashDmlaArgs& args, const Launch& launch);
void flash_dmla_backward_cpu(const FlashDmlaBackwardArgs& args, const Launch& launch);

}  // namespace dsm
