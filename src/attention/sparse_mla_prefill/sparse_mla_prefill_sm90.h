// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsm/sparse_mla.h"
#include "src/core/registry.h"

// Bound by the chip's power limit, by shared memory and by the L2's rate of rows: a pair of key blocks, 128 keys, is
// 4352 cycles of products (d_qk 576), keeps shared memory's port busy for 4800, and takes 5600, the ends of queries
// included, which are some 3500 a query and 64 heads: 3600 of the port, as output, Q and all rows go through it then.
// Without copies of rows it would take 7 % fewer with 8192 keys and 11 % fewer with 131072, where two in five come from
// the device's memory, 2.1 TB/s, whose power slows the clock by 2 to 5 %. H200, s_q 4096, bfloat16, random rows, us |
// part of the limit of 740 TFLOPS | FlashMLA of vLLM's wheel, in turns with it, under the power limit:
//
//   d_qk 576, h_q 128, topk 2048, s_kv   8192: 3562 | 89 % | 4281      d_qk 512, h_q 64, topk  512:  462 | 80 % |  549
//                                 s_kv  32768: 3878 | 81 % | 4531      d_qk 512, h_q 128, topk 1024: 1690 | 88 % | 1897
//                                 s_kv 131072: 4088 | 77 % | 4699
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
// slower), the first half of the output rounded where d_qk 512 leaves room, statistics stored while P1 V1 is multiplied
// (1 % slower) or once the output has left, rows or Q fetched to the L2 by 128 or 256 bytes or to be given up first,
// items dealt out in their order, with the two head tiles of a query at work in a cluster, in step or not (up to 1 %
// fewer cycles, as many us). Rows multicast to the blocks of two head tiles come 128 bytes a copy, as tiles are
// swizzled: 50 cycles of the warp that asks for each, and with eight warps 27 bytes a cycle, fewer than the 16-byte
// copies bring. How densely these follow each other matters by 2 %, which the compiler decides: back to back, 8192 keys
// take longer and 131072 less.

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
