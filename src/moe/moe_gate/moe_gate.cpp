// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/moe_gate/moe_gate.h"

#include <limits>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

Reason fits_a_warp(std::int64_t experts, std::int64_t topk, std::int64_t groups) {
  if (experts > kMaxCudaExperts) return "takes at most " + std::to_string(kMaxCudaExperts) + " experts";
  if (topk > kMaxCudaTopk) return "takes a topk of at most " + std::to_string(kMaxCudaTopk);
  if (groups > kMaxCudaGroups) return "takes at most " + std::to_string(kMaxCudaGroups) + " groups";
  return "";
}
Reason forward_fits(const MoeGateArgs& a) { return fits_a_warp(a.logits.size(1), a.weights.size(1), a.n_group); }
Reason backward_fits(const MoeGateBackwardArgs& a) { return fits_a_warp(a.logits.size(1), a.indices.size(1), 1); }

const Operator<MoeGateArgs> forward("moe", "moe_gate",
                                    {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(moe_gate_cuda), forward_fits},
                                     {"cpu", DeviceType::cpu, moe_gate_cpu}});
const Operator<MoeGateBackwardArgs> backward("moe", "moe_gate_backward",
                                             {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(moe_gate_backward_cuda),
                                               backward_fits},
                                              {"cpu", DeviceType::cpu, moe_gate_backward_cpu}});

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
  Check("moe_gate").workspace(launch, moe_gate_workspace(args));
  if (args.logits.size(0) == 0) return;
  forward(args, args.logits.device, launch);
}

std::size_t moe_gate_workspace(const MoeGateArgs& args) {
  const bool needed = args.logits.device.type == DeviceType::cuda && args.capacity_rows >= 0;
  if (!needed || args.weights.size(1) > kMaxCudaTopk) return 0;
  return static_cast<std::size_t>(capacity_chunks(args) * args.logits.size(1)) * sizeof(std::int32_t);
}

void moe_gate_backward(const MoeGateBackwardArgs& args, const Launch& launch) {
  check_args(args);
  if (args.logits.size(0) == 0) return;
  backward(args, args.logits.device, launch);
}

}  // namespace dsm
