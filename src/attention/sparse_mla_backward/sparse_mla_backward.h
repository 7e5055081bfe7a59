// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/sparse_mla.h"

namespace dsm {

void sparse_mla_backward_cpu(const SparseMlaBackwardArgs& args, const Launch& launch);

}  // namespace dsm
