// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/moe_gate/moe_gate.h"

#include <limits>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<MoeGateArgs> forward("moe", "moe_gate", {{"cpu", DeviceType::cpu, moe_gate_cpu}});
const Operator<MoeGateBackwardArgs> backward("moe", "moe_gate_backward",
                                             {{"cpu", DeviceType::cpu, moe_gate_backward_cpu}});

constexpr Check::DTypes kGateTypes = {DType::float32, DType::float64};

void check_logits(const Check& check, const TensorView& logits) {
  check.tensor("logits", logits, "[tokens, experts]", {Check::kAny, Check::kAny}, kGateTypes);
  check.that(logits.size(1) >= 1 && logits.size(1) <= std::numeric_limits<std::int32_t>::max(), "experts",
             "from 1 to 2^31 - 1", logits.size(1));
  check.unit_last_stride("logits", logits);
}

void check_groups(const Check& check, const MoeGateArgs& a) {
  const std::int64_t experts = a.logits.size(1), topk = a.weights.size(1);
  check.that(a.n_group >= 1 && experts % a.n_group == 0, "n_group",
             "a divisor of the number of experts, " + std::to_string(experts), a.n_group);
  check.that(a.topk_group >= 1 && a.topk_group <= a.n_group, "topk_group",
             "from 1 to n_group = " + std::to_string(a.n_group), a.topk_group);
  const std::int64_t selectable = experts / a.n_group * a.topk_group;
  check.that(topk <= selectable, "topk", "at most the " + std::to_string(selectable) + " experts that can be selected",
             topk);
}

void check_args(const MoeGateArgs& a) {
  const Check check("moe_gate");
  check_logits(check, a.logits);
  const std::int64_t tokens = a.logits.size(0), experts = a.logits.size(1);
  check.contiguous("weights", a.weights, "[tokens, topk]", {tokens, Check::kAny}, {a.logits.dtype});
  const std::int64_t topk = a.weights.size(1);
  check.that(topk >= 1, "topk", "at least 1", topk);
  check.that(topk <= experts, "topk", "at most the number of experts, " + std::to_string(experts), topk);
  check.contiguous("indices", a.indices, "[tokens, topk]", {tokens, topk}, {DType::int32});
  if (a.bias) check.contiguous("bias", a.bias, "[experts]", {experts}, {DType::float32});
  check.that(bool(a.token_ids) == bool(a.tid2eid), "token_ids", "given exactly when tid2eid is", describe(a.token_ids));
  if (a.tid2eid) {
    check.contiguous("token_ids", a.token_ids, "[tokens]", {tokens}, {DType::int64});
    check.contiguous("tid2eid", a.tid2eid, "[vocab, topk]", {Check::kAny, topk}, {DType::int32, DType::int64});
  }
  check_groups(check, a);
  check.that(a.capacity_rows >= -1, "capacity_rows", "at least 0, or -1 for no limit", a.capacity_rows);
  check.on_device(a.logits.device, {{"bias", a.bias},
                                    {"token_ids", a.token_ids},
                                    {"tid2eid", a.tid2eid},
                                    {"weights", a.weights},
                                    {"indices", a.indices}});
}

void check_args(const MoeGateBackwardArgs& a) {
  const Check check("moe_gate_backward");
  check_logits(check, a.logits);
  const std::int64_t tokens = a.logits.size(0), experts = a.logits.size(1);
  check.contiguous("dweights", a.dweights, "[tokens, topk]", {tokens, Check::kAny}, {a.logits.dtype});
  check.contiguous("indices", a.indices, "[tokens, topk]", {tokens, a.dweights.size(1)}, {DType::int32});
  check.contiguous("dlogits", a.dlogits, "[tokens, experts]", {tokens, experts}, {a.logits.dtype});
  check.on_device(a.logits.device, {{"dweights", a.dweights}, {"indices", a.indices}, {"dlogits", a.dlogits}});
}

}  // namespace

void moe_gate(const MoeGateArgs& args, const Launch& launch) {
  check_args(args);
  if (args.logits.size(0) == 0) return;
  forward(args, args.logits.device, launch);
}

void moe_gate_backward(const MoeGateBackwardArgs& args, const Launch& launch) {
  check_args(args);
  if (args.logits.size(0) == 0) return;
  backward(args, args.logits.device, launch);
}

}  // namespace dsm
