// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/indexer.h"

namespace dsm {

void indexer_kl_loss_cpu(const IndexerKlLossArgs& args, const Launch& launch);
void indexer_kl_loss_backward_cpu(const IndexerKlLossBackwardArgs& args, const Launch& launch);

}  // namespace dsm
