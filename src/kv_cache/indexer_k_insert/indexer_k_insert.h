// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/kv_cache.h"

namespace dsm {

void indexer_k_insert_cpu(const IndexerKInsertArgs& args, const Launch& launch);
void indexer_k_insert_cuda(const IndexerKInsertArgs& args, const Launch& launch);

}  // namespace dsm
