// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/indexer.h"

namespace dsm {

void indexer_topk_cpu(const IndexerTopkArgs& args, const Launch& launch);

}  // namespace dsm
