// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/kv_cache.h"

namespace dsm {

void v4_kv_insert_cpu(const V4KvInsertArgs& args, const Launch& launch);
void v4_kv_insert_cuda(const V4KvInsertArgs& args, const Launch& launch);

}  // namespace dsm
