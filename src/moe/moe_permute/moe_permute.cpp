// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/moe_permute/moe_permute.h"

#include <limits>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<MoePermuteArgs> permute("moe", "moe_permute", {{"cpu", DeviceType::cpu, moe_permute_cpu}});

void check_args(const MoePermuteArgs& a) {
  const Check check("moe_permute");
  check.contiguous("indices", a.indices, "[tokens, topk]", {Check::kAny, Check::kAny}, {DType::int32});
  const std::int64_t tokens = a.indices.size(0), topk = a.indices.size(1), rows = tokens * topk;
  check.that(rows <= std::numeric_limits<std::int32_t>::max(), "tokens * topk", "below 2^31", rows);
  check.contiguous("expert_offsets", a.expert_offsets, "[experts + 1]", {Check::kAny}, {DType::int32});
  check.that(a.expert_offsets.size(0) >= 1, "expert_offsets", "of experts + 1 elements", "none");
  check.contiguous("row_of_slot", a.row_of_slot, "[tokens, topk]", {tokens, topk}, {DType::int32});
  check.contiguous("slot_of_row", a.slot_of_row, "[tokens * topk]", {rows}, {DType::int32});
  check.that(bool(a.x) == bool(a.rows), "rows", "given exactly when x is", describe(a.rows));
  if (a.x) {
    check.tensor("x", a.x, "[tokens, hidden]", {tokens, Check::kAny}, kFloating);
    check.unit_last_stride("x", a.x);
    check.contiguous("rows", a.rows, "[tokens * topk, hidden]", {rows, a.x.size(1)}, {a.x.dtype});
  }
  check.on_device(a.indices.device, {{"x", a.x},
                                     {"rows", a.rows},
                                     {"expert_offsets", a.expert_offsets},
                                     {"row_of_slot", a.row_of_slot},
                                     {"slot_of_row", a.slot_of_row}});
}

}  // namespace

void moe_permute(const MoePermuteArgs& args, const Launch& launch) {
  check_args(args);
  permute(args, args.indices.device, launch);  // also without tokens: the offsets must become zero
}

}  // namespace dsm
