// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/launch.h"
#include "dsm/mla.h"
#include "src/core/registry.h"

// Dense decoding of DeepSeek-V3's shape in 16 bits, probabilities rounded to them, too.
//
// What bounds it and its measured times: mla_decode_sm90.cuh.

namespace dsm {

void mla_decode_sm90(const MlaDecodeArgs& args, const Launch& launch);
Reason mla_decode_sm90_refusal(const MlaDecodeArgs& args);

/// Device memory for what blocks of threads compute of requests that several of them share.
std::size_t mla_decode_sm90_workspace(const MlaDecodeArgs& args);

}  // namespace dsm
