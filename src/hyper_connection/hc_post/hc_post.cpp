// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/hyper_connection/hc_post/hc_post.h"

#include "src/core/registry.h"
#include "src/hyper_connection/mixing_checks.h"

namespace dsm {
namespace {

const Operator<HcPostArgs> forward("hyper_connection", "hc_post", {{"cpu", DeviceType::cpu, hc_post_cpu}});
const Operator<HcPostBackwardArgs> backward("hyper_connection", "hc_post_backward",
                                            {{"cpu", DeviceType::cpu, hc_post_backward_cpu}});

template <class Args>
void check_inputs(const Check& check, const Args& a) {
  hyper_connection::check_streams(check, a.x);
  const std::int64_t tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2);
  const DType wide = hyper_connection::wide(a.x.dtype);
  check.tensor("y", a.y, "[tokens, hidden]", {tokens, hidden}, {a.x.dtype});
  check.unit_last_stride("y", a.y);
  check.contiguous("post", a.post, "[tokens, hc]", {tokens, hc}, {wide});
  check.contiguous("comb", a.comb, "[tokens, hc, hc]", {tokens, hc, hc}, {wide});
  check.on_device(a.x.device, {{"y", a.y}, {"post", a.post}, {"comb", a.comb}});
}

void check_args(const HcPostArgs& a) {
  const Check check("hc_post");
  check_inputs(check, a);
  check.contiguous("out", a.out, "[tokens, hc, hidden]", {a.x.size(0), a.x.size(1), a.x.size(2)}, {a.x.dtype});
  check.on_device(a.x.device, {{"out", a.out}});
}

void check_args(const HcPostBackwardArgs& a) {
  const Check check("hc_post_backward");
  check_inputs(check, a);
  const std::int64_t tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2);
  check.tensor("dout", a.dout, "[tokens, hc, hidden]", {tokens, hc, hidden}, {a.x.dtype});
  check.unit_last_stride("dout", a.dout);
  check.contiguous("dy", a.dy, "[tokens, hidden]", {tokens, hidden}, {a.x.dtype});
  check.contiguous("dx", a.dx, "[tokens, hc, hidden]", {tokens, hc, hidden}, {a.x.dtype});
  check.contiguous("dpost", a.dpost, "[tokens, hc]", {tokens, hc}, {a.post.dtype});
  check.contiguous("dcomb", a.dcomb, "[tokens, hc, hc]", {tokens, hc, hc}, {a.post.dtype});
  check.on_device(a.x.device, {{"dout", a.dout}, {"dy", a.dy}, {"dx", a.dx}, {"dpost", a.dpost}, {"dcomb", a.dcomb}});
}

}  // namespace

void hc_post(const HcPostArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.size(0) == 0) return;
  forward(args, args.x.device, launch);
}

void hc_post_backward(const HcPostBackwardArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.size(0) == 0) return;
  backward(args, args.x.device, launch);
}

}  // namespace dsm
