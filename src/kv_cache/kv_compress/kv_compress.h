// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/kv_cache.h"

namespace dsm {

void kv_compress_cpu(const KvCompressArgs& args, const Launch& launch);
void kv_compress_backward_cpu(const KvCompressBackwardArgs& args, const Launch& launch);

}  // namespace dsm
