// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/kv_cache.h"

namespace dsm {

inline constexpr std::int64_t kMaxCudaWidth = 1 << 30;

void kv_gather_cpu(const KvGatherArgs& args, const Launch& launch);
void kv_gather_cuda(const KvGatherArgs& args, const Launch& launch);

}  // namespace dsm
