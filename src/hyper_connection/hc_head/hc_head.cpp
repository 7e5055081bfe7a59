// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/hyper_connection/hc_head/hc_head.h"

#include "src/core/registry.h"
#include "src/hyper_connection/mixing_checks.h"

namespace dsm {
namespace {

const Operator<HcHeadArgs> forward("hyper_connection", "hc_head", {{"cpu", DeviceType::cpu, hc_head_cpu}});
const Operator<HcHeadBackwardArgs> backward("hyper_connection", "hc_head_backward",
                                            {{"cpu", DeviceType::cpu, hc_head_backward_cpu}});

}  // namespace

void hc_head(const HcHeadArgs& args, const Launch& launch) {
  const Check check("hc_head");
  hyper_connection::check_streams(check, args.x);
  hyper_connection::check_mixing_forward(check, args, args.x.size(1), 1);
  if (args.x.size(0) == 0) return;
  forward(args, args.x.device, launch);
}

void hc_head_backward(const HcHeadBackwardArgs& args, const Launch& launch) {
  const Check check("hc_head_backward");
  hyper_connection::check_streams(check, args.x);
  hyper_connection::check_mixing_backward(check, args, args.x.size(1), 1);
  // No early return for zero tokens: the gradients of the parameters must still become zero.
  backward(args, args.x.device, launch);
}

}  // namespace dsm
