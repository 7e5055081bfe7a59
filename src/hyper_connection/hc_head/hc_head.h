// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/hyper_connection.h"

namespace dsm {

void hc_head_cpu(const HcHeadArgs& args, const Launch& launch);
void hc_head_backward_cpu(const HcHeadBackwardArgs& args, const Launch& launch);

}  // namespace dsm
