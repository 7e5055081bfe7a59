// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/swiglu/swiglu.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<SwigluArgs> forward("moe", "swiglu",
                                   {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(swiglu_cuda)},
                                    {"cpu", DeviceType::cpu, swiglu_cpu}});
const Operator<SwigluBackwardArgs> backward("moe", "swiglu_backward",
                                            {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(swiglu_backward_cuda)},
                                             {"cpu", DeviceType::cpu, swiglu_backward_cpu}});

void check_z(const Check& check, const TensorView& z, double limit) {
  check.tensor("z", z, "[rows, 2 * intermediate]", {Check::kAny, Check::kAny}, kFloating);
  check.that(z.size(1) % 2 == 0, "z", "of an even number of columns, the gates and then the ups", z.size(1));
  check.unit_last_stride("z", z);
  check.that(limit > 0, "limit", "above 0", std::to_string(limit));
}

void check_args(const SwigluArgs& a) {
  const Check check("swiglu");
  check_z(check, a.z, a.limit);
  check.contiguous("y", a.y, "[rows, intermediate]", {a.z.size(0), a.z.size(1) / 2}, {a.z.dtype});
  check.on_device(a.z.device, {{"y", a.y}});
}

void check_args(const SwigluBackwardArgs& a) {
  const Check check("swiglu_backward");
  check_z(check, a.z, a.limit);
  check.tensor("dy", a.dy, "[rows, intermediate]", {a.z.size(0), a.z.size(1) / 2}, {a.z.dtype});
  check.unit_last_stride("dy", a.dy);
  check.contiguous("dz", a.dz, "[rows, 2 * intermediate]", {a.z.size(0), a.z.size(1)}, {a.z.dtype});
  check.on_device(a.z.device, {{"dy", a.dy}, {"dz", a.dz}});
}

}  // namespace

void swiglu(const SwigluArgs& args, const Launch& launch) {
  check_args(args);
  if (args.z.numel() == 0) return;
  forward(args, args.z.device, launch);
}

void swiglu_backward(const SwigluBackwardArgs& args, const Launch& launch) {
  check_args(args);
  if (args.z.numel() == 0) return;
  backward(args, args.z.device, launch);
}

}  // namespace dsm
