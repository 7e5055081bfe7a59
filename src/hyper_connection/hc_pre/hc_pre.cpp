// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/hyper_connection/hc_pre/hc_pre.h"

#include <cmath>

#include "src/core/registry.h"
#include "src/hyper_connection/mixing_checks.h"

namespace dsm {
namespace {

// Far more than Sinkhorn-Knopp needs; the backward pass keeps all of a token's matrices at a time.
constexpr int kMaxIterations = 1000;

const Operator<HcPreArgs> forward("hyper_connection", "hc_pre", {{"cpu", DeviceType::cpu, hc_pre_cpu}});
const Operator<HcPreBackwardArgs> backward("hyper_connection", "hc_pre_backward",
                                           {{"cpu", DeviceType::cpu, hc_pre_backward_cpu}});

template <class Args>
void check_sinkhorn(const Check& check, const Args& a) {
  check.that(a.iterations >= 1 && a.iterations <= kMaxIterations, "iterations",
             "between 1 and " + std::to_string(kMaxIterations), a.iterations);
  check.that(std::isfinite(a.post_mult), "post_mult", "a finite number", std::to_string(a.post_mult));
}

void check_args(const HcPreArgs& a) {
  const Check check("hc_pre");
  hyper_connection::check_streams(check, a.x);
  check_sinkhorn(check, a);
  const std::int64_t tokens = a.x.size(0), hc = a.x.size(1);
  hyper_connection::check_mixing_forward(check, a, (2 + hc) * hc, 3);
  check.contiguous("post", a.post, "[tokens, hc]", {tokens, hc}, {a.fn.dtype});
  check.contiguous("comb", a.comb, "[tokens, hc, hc]", {tokens, hc, hc}, {a.fn.dtype});
  check.on_device(a.x.device, {{"post", a.post}, {"comb", a.comb}});
}

void check_args(const HcPreBackwardArgs& a) {
  const Check check("hc_pre_backward");
  hyper_connection::check_streams(check, a.x);
  check_sinkhorn(check, a);
  const std::int64_t tokens = a.x.size(0), hc = a.x.size(1);
  hyper_connection::check_mixing_backward(check, a, (2 + hc) * hc, 3);
  check.contiguous("dpost", a.dpost, "[tokens, hc]", {tokens, hc}, {a.fn.dtype});
  check.contiguous("dcomb", a.dcomb, "[tokens, hc, hc]", {tokens, hc, hc}, {a.fn.dtype});
  check.on_device(a.x.device, {{"dpost", a.dpost}, {"dcomb", a.dcomb}});
}

}  // namespace

void hc_pre(const HcPreArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.size(0) == 0) return;
  forward(args, args.x.device, launch);
}

void hc_pre_backward(const HcPreBackwardArgs& args, const Launch& launch) {
  check_args(args);
  // No early return for zero tokens: the gradients of the parameters must still become zero.
  backward(args, args.x.device, launch);
}

}  // namespace dsm
