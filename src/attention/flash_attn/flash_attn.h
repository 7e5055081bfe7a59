// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/attention.h"

namespace dsm {

void flash_attn_cpu(const FlashAttnArgs& args, const Launch& launch);
void flash_attn_backward_cpu(const FlashAttnBackwardArgs& args, const Launch& launch);

}  // namespace dsm
