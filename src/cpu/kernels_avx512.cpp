// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c (CMake sets this by the file's name).
#if defined(__x86_64__)
#include "src/cpu/kernel_table.h"

namespace dsm::cpu {

constexpr IsaKernels kAvx512Kernels = {kKernels<float>, kKernels<double>};

}  // namespace dsm::cpu
#endif
