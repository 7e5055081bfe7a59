// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsm/sparse_mla.h"
#include "src/core/registry.h"

// Bound by the chip's power limit, by shared memory and by the L2's rate of rows: a pair of key blocks, 128 keys, is
// 4352 cycles of products (d_qk 576), asks 4800 of shared memory's port, and takes 5600, the ends of queries included,
// which are some 3500 a query and 64 heads. Without copies of rows it would take 7 % fewer with 8192 keys and 11 %
// fewer with 131072, where two in five come from the device's memory. H200, s_q 4096, bfloat16, random rows, us | part
// of the limit of 740 TFLOPS | FlashMLA of vLLM's wheel, in turns with it, under the power limit:
//
//   d_qk 576, h_q 128, topk 2048, s_kv   8192: 3803 | 83 % | 4510      d_qk 512, h_q 64, topk  512:  487 | 76 % |  604
//                                 s_kv  32768: 3950 | 80 % | 4572      d_qk 512, h_q 128, topk 1024: 1744 | 85 % | 2078
//                                 s_kv 131072: 4278 | 74 % | 4880
//
// Up to 16 heads have a kernel of their own (sparse_mla_prefill_sm90_few_heads.cuh).
//
// Weights relative to a maximum that may lag by 2^8 save 3 to 5 % of the time, as the output is rarely rescaled then,
// and make the error 2 to 5 % larger. No gain: L2 prefetches of the next keys, line by line or by rows that the head
// tiles of a query share (2 to 16 % slower), P0 V0 begun with 32 keys or queued right behind S1, no fences behind the
// rows' arrival (they would be missing), keys let go 16 at a time, blocks that begin at different times, queries cut
// between blocks so that all end alike, the output stored from registers (2 to 6 % slower), its place let go before the
// next S0, or rounded beside that (3 to 4 % slower: it stands still), the last tile of Q kept in registers (it spills),
// rows that the L2 is to keep, indices asked for two pairs ahead, the next query taken before the last pair (1 to 4 %
// slower). Rows multicast to the blocks of two head tiles come 128 bytes a copy, as tiles are swizzled: 50 cycles of
// the warp that asks for each, and with eight warps 27 bytes a cycle, fewer than the 16-byte copies bring. How densely
// these follow each other matters by 2 %, which the compiler decides: back to back, 8192 keys take longer and 131072
// less.

namespace dsm {

/// Why the Hopper implementation refuses a request: it takes float16 and bfloat16, d_qk 512 or 576, d_v 512, one key
/// head, 16-byte aligned rows, and gives no key_probs.
Reason sparse_mla_prefill_sm90_refusal(const SparseMlaPrefillArgs& args);
std::size_t sparse_mla_prefill_sm90_workspace(const SparseMlaPrefillArgs& args);
void sparse_mla_prefill_sm90(const SparseMlaPrefillArgs& args, const Launch& launch);

namespace sparse_prefill_sm90 {

/// A call as the kernel sees it, but for queries and output, which have tensor maps. Strides count elements.
struct Problem {
  const void* q;  ///< only where it begins: rows of zeros are copied from an address, too
  const void* kv;
  std::int64_t kv_row;
  const std::int32_t* indices;
  std::int64_t indices_token;
  const float* attn_sink;           ///< [h_q] or null
  const std::int32_t* topk_length;  ///< [s_q] or null
  float* max_logits;                ///< [s_q, h_q] or null
  float* lse;                       ///< [s_q, h_q] in these strides
  std::int64_t lse_query, lse_head;
  std::int32_t items;   ///< queries times head_tiles
  std::int32_t* taken;  ///< how many of them beside each block's first one; 0 before the call
  std::int32_t h_q, head_tiles, s_kv, topk;
  float softmax_scale;
};

}  // namespace sparse_prefill_sm90
}  // namespace dsm
