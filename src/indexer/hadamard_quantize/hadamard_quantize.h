// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/indexer.h"

namespace dsm {

void hadamard_quantize_cpu(const HadamardQuantizeArgs& args, const Launch& launch);

}  // namespace dsm
