// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/hyper_connection.h"

namespace dsm {

void hc_pre_cpu(const HcPreArgs& args, const Launch& launch);
void hc_pre_backward_cpu(const HcPreBackwardArgs& args, const Launch& launch);

}  // namespace dsm
