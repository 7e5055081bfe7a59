// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/indexer.h"

namespace dsm {

void indexer_logits_cpu(const IndexerLogitsArgs& args, const Launch& launch);
void indexer_logits_backward_cpu(const IndexerLogitsBackwardArgs& args, const Launch& launch);

}  // namespace dsm
