// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Compiled with -mavx2 -mfma -mf16c (CMake sets this by the file's name).
#if defined(__x86_64__)
#include "src/cpu/kernel_table.h"

namespace dsm::cpu {

constexpr IsaKernels kAvx2Kernels = {kKernels<float>, kKernels<double>};

}  // namespace dsm::cpu
#endif
