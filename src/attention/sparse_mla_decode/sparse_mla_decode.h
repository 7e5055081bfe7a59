// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/mla.h"

namespace dsm {

void sparse_mla_decode_cpu(const SparseMlaDecodeArgs& args, const Launch& launch);
void sparse_mla_decode_cuda(const SparseMlaDecodeArgs& args, const Launch& launch);
std::size_t sparse_mla_decode_cuda_workspace(const SparseMlaDecodeArgs& args);

}  // namespace dsm
