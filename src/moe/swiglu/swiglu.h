// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

void swiglu_cpu(const SwigluArgs& args, const Launch& launch);
void swiglu_backward_cpu(const SwigluBackwardArgs& args, const Launch& launch);
void swiglu_cuda(const SwigluArgs& args, const Launch& launch);
void swiglu_backward_cuda(const SwigluBackwardArgs& args, const Launch& launch);

}  // namespace dsm
