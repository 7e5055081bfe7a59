// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>
#include <vector>

#include "src/core/checks.h"
#include "src/core/parallel_for.h"
#include "src/moe/moe_permute/moe_permute.h"

namespace dsm {
namespace {

/// A counting sort: pairs per expert, their exclusive sum, then every pair to its expert's next place. Visiting pairs
/// in order keeps them in order inside each expert.
void make_plan(const MoePermuteArgs& a) {
  const std::int64_t pairs = a.indices.numel(), experts = a.expert_offsets.size(0) - 1;
  const std::int32_t* indices = a.indices.as<const std::int32_t>();
  std::int32_t* offsets = a.expert_offsets.as<std::int32_t>();
  for (std::int64_t i = 0; i < pairs; ++i)
    Check("moe_permute")
        .that(indices[i] < experts, "indices", "below the number of experts, " + std::to_string(experts), indices[i]);

  std::fill_n(offsets, experts + 1, 0);
  for (std::int64_t i = 0; i < pairs; ++i)
    if (indices[i] >= 0) ++offsets[indices[i] + 1];
  for (std::int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];

  std::vector<std::int32_t> next(offsets, offsets + experts);
  std::int32_t* slot_of_row = a.slot_of_row.as<std::int32_t>();
  std::fill_n(slot_of_row, pairs, -1);
  for (std::int64_t i = 0; i < pairs; ++i) {
    const std::int32_t row = indices[i] < 0 ? -1 : next[indices[i]]++;
    a.row_of_slot.as<std::int32_t>()[i] = row;
    if (row >= 0) slot_of_row[row] = static_cast<std::int32_t>(i);
  }
}

void copy_rows(const MoePermuteArgs& a) {
  const std::int64_t topk = a.indices.size(1), element = element_size(a.x.dtype), row_bytes = a.x.size(1) * element;
  const std::int32_t* slot_of_row = a.slot_of_row.as<const std::int32_t>();
  if (row_bytes == 0) return;
  parallel_for(
      0, a.rows.size(0), std::max<std::int64_t>(1, 65536 / row_bytes), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          char* to = a.rows.as<char>() + row * row_bytes;
          if (slot_of_row[row] < 0)
            std::memset(to, 0, row_bytes);
          else
            std::memcpy(to, a.x.as<const char>() + slot_of_row[row] / topk * a.x.stride[0] * element, row_bytes);
        }
      });
}

}  // namespace

void moe_permute_cpu(const MoePermuteArgs& args, const Launch&) {
  make_plan(args);
  if (args.x) copy_rows(args);
}

}  // namespace dsm
