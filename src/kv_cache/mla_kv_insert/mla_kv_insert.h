// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/kv_cache.h"

namespace dsm {

void mla_kv_insert_cpu(const MlaKvInsertArgs& args, const Launch& launch);
void mla_kv_insert_cuda(const MlaKvInsertArgs& args, const Launch& launch);

}  // namespace dsm
