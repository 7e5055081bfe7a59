// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/mla.h"
#include "src/core/registry.h"

namespace dsm {

/// Why the Hopper kernel does not take a request: it wants bfloat16 queries; quantised caches of one format or V4.1's
/// two, or, for 16 heads or more, bfloat16 ones; d_v = 512, a positive scale and 16-byte alignment.
Reason sparse_mla_decode_sm90_refusal(const SparseMlaDecodeArgs& args);
std::size_t sparse_mla_decode_sm90_workspace(const SparseMlaDecodeArgs& args);
void sparse_mla_decode_sm90(const SparseMlaDecodeArgs& args, const Launch& launch);

}  // namespace dsm
