// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Compiled for what every processor of the target has: SSE2, NEON.
#include "src/cpu/kernel_table.h"

namespace dsm::cpu {

constexpr IsaKernels kBaselineKernels = {kKernels<float>, kKernels<double>};

}  // namespace dsm::cpu
