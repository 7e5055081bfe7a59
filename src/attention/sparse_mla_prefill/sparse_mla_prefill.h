// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/sparse_mla.h"

namespace dsm {

void sparse_mla_prefill_cpu(const SparseMlaPrefillArgs& args, const Launch& launch);
void sparse_mla_prefill_cuda(const SparseMlaPrefillArgs& args, const Launch& launch);
std::size_t sparse_mla_prefill_cuda_workspace(const SparseMlaPrefillArgs& args);

}  // namespace dsm
