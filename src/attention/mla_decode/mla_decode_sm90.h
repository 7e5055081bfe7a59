// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include "dsm/launch.h"
#include "dsm/mla.h"
#include "src/core/registry.h"

// Dense decoding of DeepSeek-V3's shape in 16 bits, probabilities rounded to them, too.
//
// One query row tile (up to 64 rows) is bound by memory, more of them by the matrix units. H200, microseconds for a
// whole call in a graph with a cold L2; FlashMLA of the same run; the limit at 4.3 TB/s and 740 TFLOPS:
//
//   batch   keys  queries     heads        here    FlashMLA      limit
//     128   4096    1 | 2       128   268 | 495  271 | 505  198 | 397
//     128   8192    1 | 2       128   492 | 990  497 | 990  397 | 793
//      64  16384        1   16 | 64   301 | 306  310 | 317  281 | 281
//       1  65536        1  16 | 128  32.7 |47.3   80 |  85   18 |  25
//       4   8192        1       128          32          54         12
//       2   8192        1        16          19          44        4.4
//
// With many rows the matrix units are busy 59 % of the time: a block of 64 keys takes 3600 clocks, not 2176, because
// softmax (1000) and the products between one softmax and the next (2300, both warpgroups' at the same time) follow
// each other. Requests that two parts share cost about 10 us at batch 128, most of it in the combining kernel; when all
// parts end at the same time, writing their pieces takes 3 us, what the L2 takes in, and adding them up 6.
// Did not help: all of S before the other's product (8 % slower: half a buffer is released later, and new keys are
// there 1700 clocks after that); fetching keys into the L2 two or three blocks ahead (1 to 12 % slower).

namespace dsm {

void mla_decode_sm90(const MlaDecodeArgs& args, const Launch& launch);
Reason mla_decode_sm90_refusal(const MlaDecodeArgs& args);

/// Device memory for what blocks of threads compute of requests that several of them share.
std::size_t mla_decode_sm90_workspace(const MlaDecodeArgs& args);

}  // namespace dsm
