// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/norm_rope.h"

namespace dsm {

/// CUDA adds up dweight in two stages: at most this many sums over some of the rows each, then those.
inline constexpr std::int64_t kDweightPartials = 1024;

void rms_norm_cpu(const RmsNormArgs& args, const Launch& launch);
void rms_norm_backward_cpu(const RmsNormBackwardArgs& args, const Launch& launch);
void rms_norm_cuda(const RmsNormArgs& args, const Launch& launch);
void rms_norm_backward_cuda(const RmsNormBackwardArgs& args, const Launch& launch);

}  // namespace dsm
