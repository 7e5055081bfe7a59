// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsm/sparse_mla.h"
#include "src/core/registry.h"

// Bound by the chip's power limit, by the L2's rate of rows and by shared memory: a pair of key blocks, 128 keys, is
// 4352 cycles of products (d_qk 576) and takes 5710, the ends of queries included. H200, s_q 4096, bfloat16, random
// rows, us | part of the limit (740 TFLOPS, or 5.6 TB/s of rows where h_q is 16) | FlashMLA of vLLM's wheel, padded to
// 64 heads, in the same run, before the last change, which took 1.7 % off the first case and 3 % off that of 131072
// keys:
//
//   d_qk 576, h_q 128, topk 2048, s_kv   8192: 3404 | 93 % | 3729      d_qk 512, h_q  64, topk  512:  468 | 79 % |  549
//                                 s_kv  32768: 3559 | 89 % | 3957      d_qk 512, h_q 128, topk 1024: 1691 | 88 % | 1887
//                                 s_kv 131072: 3774 | 84 % | 4119      d_qk 576, h_q  16, topk 2048: 1688 |102 % | 1900
//
// Weights relative to a maximum that may lag by 2^8 save 3 to 5 % of the time, as the output is rarely rescaled then,
// and make the error 2 to 5 % larger. No gain: L2 prefetches of the next rows (11 % slower), P0 V0 begun with 32
// keys or queued right behind S1, no fences behind the rows' arrival (they would be missing), keys let go 16 at a time,
// blocks that begin at different times, queries cut between blocks so that all end alike.

namespace dsm {

/// Why the Hopper implementation refuses a request: it takes float16 and bfloat16, d_qk 512 or 576, d_v 512, one key
/// head, 16-byte aligned rows, and gives no key_probs.
Reason sparse_mla_prefill_sm90_refusal(const SparseMlaPrefillArgs& args);
std::size_t sparse_mla_prefill_sm90_workspace(const SparseMlaPrefillArgs& args);
void sparse_mla_prefill_sm90(const SparseMlaPrefillArgs& args, const Launch& launch);

namespace sparse_prefill_sm90 {

/// A call as the kernel sees it, but for the output, which has a tensor map. Strides count elements.
struct Problem {
  const void* q;
  std::int64_t q_token, q_head;
  const void* kv;
  std::int64_t kv_row;
  const std::int32_t* indices;
  std::int64_t indices_token;
  const float* attn_sink;           ///< [h_q] or null
  const std::int32_t* topk_length;  ///< [s_q] or null
  float *max_logits, *lse;          ///< [s_q, h_q]
  std::int32_t items;               ///< queries times head_tiles
  std::int32_t* taken;              ///< how many of them beside each block's first one; 0 before the call
  std::int32_t h_q, head_tiles, s_kv, topk;
  float softmax_scale;
};

}  // namespace sparse_prefill_sm90
}  // namespace dsm
