// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/indexer.h"

namespace dsm {

void paged_indexer_logits_cpu(const PagedIndexerLogitsArgs& args, const Launch& launch);

}  // namespace dsm
