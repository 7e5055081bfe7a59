// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/hyper_connection.h"

namespace dsm {

void hc_post_cpu(const HcPostArgs& args, const Launch& launch);
void hc_post_backward_cpu(const HcPostBackwardArgs& args, const Launch& launch);

}  // namespace dsm
