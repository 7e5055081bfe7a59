// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/norm_rope/v4_q_norm_rope/v4_q_norm_rope.h"

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/norm_rope/rotation_checks.h"

namespace dsm {
namespace {

const Operator<V4QNormRopeArgs> forward("norm_rope", "v4_q_norm_rope", {{"cpu", DeviceType::cpu, v4_q_norm_rope_cpu}});
const Operator<V4QNormRopeBackwardArgs> backward("norm_rope", "v4_q_norm_rope_backward",
                                                 {{"cpu", DeviceType::cpu, v4_q_norm_rope_backward_cpu}});

/// rstd is the forward pass's result and the backward pass's argument.
template <class Args>
void check_inputs(const Check& check, const Args& a) {
  check_rotated(check, "q", a.q, a.positions, a.inv_freq);
  const DType wide = a.q.dtype == DType::float64 ? DType::float64 : DType::float32;
  check.contiguous("rstd", a.rstd, "[tokens, heads]", {a.q.size(0), a.q.size(1)}, {wide});
  check.on_device(a.q.device, {{"rstd", a.rstd}});
}

}  // namespace

void v4_q_norm_rope(const V4QNormRopeArgs& args, const Launch& launch) {
  const Check check("v4_q_norm_rope");
  check_inputs(check, args);
  check.that(args.eps >= 0, "eps", "at least 0", std::to_string(args.eps));
  check.contiguous("y", args.y, "[tokens, heads, d]", {args.q.size(0), args.q.size(1), args.q.size(2)}, {args.q.dtype});
  check.on_device(args.q.device, {{"y", args.y}});
  if (args.q.numel() == 0) return;
  forward(args, args.q.device, launch);
}

void v4_q_norm_rope_backward(const V4QNormRopeBackwardArgs& args, const Launch& launch) {
  const Check check("v4_q_norm_rope_backward");
  check_inputs(check, args);
  const std::int64_t tokens = args.q.size(0), heads = args.q.size(1), d = args.q.size(2);
  check.tensor("dy", args.dy, "[tokens, heads, d]", {tokens, heads, d}, {args.q.dtype});
  check.unit_last_stride("dy", args.dy);
  check.contiguous("dq", args.dq, "[tokens, heads, d]", {tokens, heads, d}, {args.q.dtype});
  check.on_device(args.q.device, {{"dy", args.dy}, {"dq", args.dq}});
  if (args.q.numel() == 0) return;
  backward(args, args.q.device, launch);
}

}  // namespace dsm
