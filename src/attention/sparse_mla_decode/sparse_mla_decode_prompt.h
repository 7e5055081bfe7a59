// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/mla.h"
#include "src/core/registry.h"

namespace dsm {

/// Why sparse_mla_prefill on a dequantised copy of the caches does not take a request, or is no faster: whether a copy
/// pays depends on how many rows the caches have and how wide the batch's lists are.
Reason sparse_mla_decode_prompt_refusal(const SparseMlaDecodeArgs& args);
std::size_t sparse_mla_decode_prompt_workspace(const SparseMlaDecodeArgs& args);
void sparse_mla_decode_prompt(const SparseMlaDecodeArgs& args, const Launch& launch);

}  // namespace dsm
