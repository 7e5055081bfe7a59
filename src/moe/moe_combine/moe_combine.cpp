// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/moe_combine/moe_combine.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<MoeCombineArgs> forward("moe", "moe_combine", {{"cpu", DeviceType::cpu, moe_combine_cpu}});
const Operator<MoeCombineBackwardArgs> backward("moe", "moe_combine_backward",
                                                {{"cpu", DeviceType::cpu, moe_combine_backward_cpu}});

DType wide(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

void check_rows(const Check& check, const TensorView& rows, const TensorView& row_of_slot, const TensorView& weights) {
  check.contiguous("rows", rows, "[rows, hidden]", {Check::kAny, Check::kAny}, kFloating);
  check.contiguous("row_of_slot", row_of_slot, "[tokens, topk]", {Check::kAny, Check::kAny}, {DType::int32});
  if (weights)
    check.contiguous("weights", weights, "[tokens, topk]", {row_of_slot.size(0), row_of_slot.size(1)},
                     {wide(rows.dtype)});
}

void check_args(const MoeCombineArgs& a) {
  const Check check("moe_combine");
  check_rows(check, a.rows, a.row_of_slot, a.weights);
  const std::int64_t tokens = a.row_of_slot.size(0), hidden = a.rows.size(1);
  if (a.shared) check.contiguous("shared", a.shared, "[tokens, hidden]", {tokens, hidden}, {a.rows.dtype});
  check.contiguous("y", a.y, "[tokens, hidden]", {tokens, hidden}, {a.rows.dtype});
  check.on_device(a.rows.device,
                  {{"row_of_slot", a.row_of_slot}, {"weights", a.weights}, {"shared", a.shared}, {"y", a.y}});
}

void check_args(const MoeCombineBackwardArgs& a) {
  const Check check("moe_combine_backward");
  check_rows(check, a.rows, a.row_of_slot, a.weights);
  const std::int64_t tokens = a.row_of_slot.size(0), topk = a.row_of_slot.size(1), hidden = a.rows.size(1);
  check.contiguous("dy", a.dy, "[tokens, hidden]", {tokens, hidden}, {a.rows.dtype});
  check.contiguous("drows", a.drows, "[rows, hidden]", {a.rows.size(0), hidden}, {a.rows.dtype});
  check.that(bool(a.weights) == bool(a.dweights), "dweights", "given exactly when weights is", describe(a.dweights));
  if (a.dweights) check.contiguous("dweights", a.dweights, "[tokens, topk]", {tokens, topk}, {a.weights.dtype});
  check.on_device(a.rows.device, {{"dy", a.dy},
                                  {"row_of_slot", a.row_of_slot},
                                  {"weights", a.weights},
                                  {"drows", a.drows},
                                  {"dweights", a.dweights}});
}

}  // namespace

void moe_combine(const MoeCombineArgs& args, const Launch& launch) {
  check_args(args);
  if (args.y.numel() == 0) return;
  forward(args, args.rows.device, launch);
}

void moe_combine_backward(const MoeCombineBackwardArgs& args, const Launch& launch) {
  check_args(args);
  backward(args, args.rows.device, launch);  // also without tokens: drows must become zero
}

}  // namespace dsm
