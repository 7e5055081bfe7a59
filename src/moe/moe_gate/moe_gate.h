// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/moe.h"

namespace dsm {

/// Keeps a sum of scores that all underflowed from dividing by zero.
inline constexpr double kGateEpsilon = 1e-20;

void moe_gate_cpu(const MoeGateArgs& args, const Launch& launch);
void moe_gate_backward_cpu(const MoeGateBackwardArgs& args, const Launch& launch);

// A lane of a warp holds 1/32 of a token's logits in registers, or one slot.
inline constexpr std::int64_t kMaxCudaExperts = 1024, kMaxCudaTopk = 32, kMaxCudaGroups = 32;

void moe_gate_cuda(const MoeGateArgs& args, const Launch& launch);
void moe_gate_backward_cuda(const MoeGateBackwardArgs& args, const Launch& launch);

// Capacity on CUDA: the tokens go in chunks of at most this many pairs, and the workspace holds a count per chunk and
// expert.
inline constexpr int kCapacityChunkPairs = 1024;

inline std::int64_t capacity_chunks(const MoeGateArgs& args) {
  const std::int64_t tokens_per_chunk = kCapacityChunkPairs / args.weights.size(1);
  return (args.logits.size(0) + tokens_per_chunk - 1) / tokens_per_chunk;
}

/// Applies the capacity to indices and turns the scores in weights into weights.
void moe_gate_capacity_cuda(const MoeGateArgs& args, const Launch& launch);

}  // namespace dsm
