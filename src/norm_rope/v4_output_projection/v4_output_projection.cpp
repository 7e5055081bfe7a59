// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/norm_rope/v4_output_projection/v4_output_projection.h"

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/norm_rope/rotation_checks.h"

namespace dsm {
namespace {

const Operator<V4OutputProjectionArgs> forward("norm_rope", "v4_output_projection",
                                               {{"cpu", DeviceType::cpu, v4_output_projection_cpu}});
const Operator<V4OutputProjectionBackwardArgs> backward("norm_rope", "v4_output_projection_backward",
                                                        {{"cpu", DeviceType::cpu, v4_output_projection_backward_cpu}});

template <class Args>
void check_inputs(const Check& check, const Args& a) {
  check_rotated(check, "o", a.o, a.positions, a.inv_freq);
  const std::int64_t heads = a.o.size(1), d = a.o.size(2);
  check.that(a.groups >= 1 && heads % a.groups == 0, "groups", "a divisor of heads = " + std::to_string(heads),
             a.groups);
  check.contiguous("wo_a", a.wo_a, "[groups * rank, heads / groups * d]", {Check::kAny, heads / a.groups * d},
                   {a.o.dtype});
  check.that(a.wo_a.size(0) % a.groups == 0, "wo_a", "of a multiple of groups = " + std::to_string(a.groups) + " rows",
             a.wo_a.size(0));
  check.on_device(a.o.device, {{"wo_a", a.wo_a}});
}

}  // namespace

void v4_output_projection(const V4OutputProjectionArgs& args, const Launch& launch) {
  const Check check("v4_output_projection");
  check_inputs(check, args);
  check.contiguous("z", args.z, "[tokens, groups * rank]", {args.o.size(0), args.wo_a.size(0)}, {args.o.dtype});
  check.on_device(args.o.device, {{"z", args.z}});
  if (args.z.numel() == 0) return;
  forward(args, args.o.device, launch);
}

void v4_output_projection_backward(const V4OutputProjectionBackwardArgs& args, const Launch& launch) {
  const Check check("v4_output_projection_backward");
  check_inputs(check, args);
  const std::int64_t tokens = args.o.size(0), heads = args.o.size(1), d = args.o.size(2);
  const std::int64_t outputs = args.wo_a.size(0), width = args.wo_a.size(1);
  check.tensor("dz", args.dz, "[tokens, groups * rank]", {tokens, outputs}, {args.o.dtype});
  check.unit_last_stride("dz", args.dz);
  if (args.d_o) check.contiguous("d_o", args.d_o, "[tokens, heads, d]", {tokens, heads, d}, {args.o.dtype});
  if (args.dwo_a)
    check.contiguous("dwo_a", args.dwo_a, "[groups * rank, heads / groups * d]", {outputs, width}, {args.o.dtype});
  check.on_device(args.o.device, {{"dz", args.dz}, {"d_o", args.d_o}, {"dwo_a", args.dwo_a}});
  // No early return for zero tokens: dwo_a must still become zero.
  if (args.d_o || args.dwo_a) backward(args, args.o.device, launch);
}

}  // namespace dsm
