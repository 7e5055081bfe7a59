// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/mla.h"

namespace dsm {

void merge_attention_states_cpu(const MergeAttentionStatesArgs& args, const Launch& launch);
void merge_attention_states_cuda(const MergeAttentionStatesArgs& args, const Launch& launch);

}  // namespace dsm
