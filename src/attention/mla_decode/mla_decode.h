// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/mla.h"

namespace dsm {

void mla_decode_cpu(const MlaDecodeArgs& args, const Launch& launch);
void mla_decode_cuda(const MlaDecodeArgs& args, const Launch& launch);
std::size_t mla_decode_cuda_workspace(const MlaDecodeArgs& args);

}  // namespace dsm
