// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

/// Keeps a sum of scores that all underflowed from dividing by zero.
inline constexpr double kGateEpsilon = 1e-20;

void moe_gate_cpu(const MoeGateArgs& args, const Launch& launch);
void moe_gate_backward_cpu(const MoeGateBackwardArgs& args, const Launch& launch);

}  // namespace dsm
