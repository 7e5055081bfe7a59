// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/flash_dmla/flash_dmla.h"

#include <cmath>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<FlashDmlaArgs> forward("attention", "flash_dmla", {{"cpu", DeviceType::cpu, flash_dmla_cpu}});
const Operator<FlashDmlaBackwardArgs> backward("attention", "flash_dmla_backward",
                                               {{"cpu", DeviceType::cpu, flash_dmla_backward_cpu}});

/// What both passes take in. `a` is FlashDmlaArgs or FlashDmlaBackwardArgs. Returns d_latent.
template <class Args>
std::int64_t check_inputs(const Check& check, const Args& a) {
  constexpr std::int64_t any = Check::kAny;
  check.tensor("q", a.q, "[batch, heads, s_q, d_qk]", {any, any, any, any}, kFloating);
  const std::int64_t batch = a.q.size(0), heads = a.q.size(1), s_q = a.q.size(2), d_qk = a.q.size(3);
  const Check::DTypes dtype = {a.q.dtype};
  if (a.wk) check.tensor("wk", a.wk, "[d_qk, d_latent]", {d_qk, any}, dtype);
  std::int64_t d_latent;
  if (a.cache_is_latent) {
    d_latent = a.wk ? a.wk.size(1) : d_qk;
    check.tensor("k", a.k, "[batch, heads, s_kv, d_latent]", {batch, heads, any, d_latent}, dtype);
    check.tensor("v", a.v, "[batch, heads, s_kv, d_latent]", {batch, heads, a.k.size(2), d_latent}, dtype);
    if (a.wv) check.tensor("wv", a.wv, "[d_v, d_latent]", {any, d_latent}, dtype);
  } else {
    check.that(bool(a.wk), "wk", "given unless cache_is_latent", describe(a.wk));
    d_latent = a.wk.size(1);
    check.tensor("k", a.k, "[batch, heads, s_kv, d_qk]", {batch, heads, any, d_qk}, dtype);
    check.tensor("v", a.v, "[batch, heads, s_kv, d_v]", {batch, heads, a.k.size(2), any}, dtype);
    check.tensor("wv", a.wv, "[d_v, d_latent]", {a.v.size(3), d_latent}, dtype);
  }
  check.unit_last_stride("q", a.q);
  check.unit_last_stride("k", a.k);
  check.unit_last_stride("v", a.v);
  if (a.wk) check.unit_last_stride("wk", a.wk);
  if (a.wv) check.unit_last_stride("wv", a.wv);
  const std::int64_t s_kv = a.k.size(2);
  check.that(!a.causal || s_q <= s_kv, "s_q", "at most s_kv = " + std::to_string(s_kv) + " when causal", s_q);
  check.that(std::isfinite(a.softmax_scale), "softmax_scale", "finite", std::to_string(a.softmax_scale));
  return d_latent;
}

DType statistics(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

void check_args(const FlashDmlaArgs& a) {
  const Check check("flash_dmla");
  const std::int64_t d_latent = check_inputs(check, a);
  const std::int64_t batch = a.q.size(0), heads = a.q.size(1), s_q = a.q.size(2);
  if (a.out) {
    check.that(bool(a.wv), "wv", "given for an output projection", describe(a.wv));
    check.contiguous("out", a.out, "[batch, heads, s_q, d_v]", {batch, heads, s_q, a.wv.size(0)}, {a.q.dtype});
  }
  check.contiguous("latent", a.latent, "[batch, heads, s_q, d_latent]", {batch, heads, s_q, d_latent}, {a.q.dtype});
  check.contiguous("lse", a.lse, "[batch, heads, s_q]", {batch, heads, s_q}, {statistics(a.q.dtype)});
  check.on_device(
      a.q.device,
      {{"k", a.k}, {"v", a.v}, {"wk", a.wk}, {"wv", a.wv}, {"out", a.out}, {"latent", a.latent}, {"lse", a.lse}});
}

void check_args(const FlashDmlaBackwardArgs& a) {
  const Check check("flash_dmla_backward");
  const std::int64_t d_latent = check_inputs(check, a);
  const std::int64_t batch = a.q.size(0), heads = a.q.size(1), s_q = a.q.size(2);
  const DType dtype = a.q.dtype;
  if (a.dout) {
    check.that(bool(a.wv), "wv", "given with dout", describe(a.wv));
    check.tensor("dout", a.dout, "[batch, heads, s_q, d_v]", {batch, heads, s_q, a.wv.size(0)}, {dtype});
    check.unit_last_stride("dout", a.dout);
  }
  if (a.dlatent) {
    check.tensor("dlatent", a.dlatent, "[batch, heads, s_q, d_latent]", {batch, heads, s_q, d_latent}, {dtype});
    check.unit_last_stride("dlatent", a.dlatent);
  }
  if (a.dlse) check.contiguous("dlse", a.dlse, "[batch, heads, s_q]", {batch, heads, s_q}, {statistics(dtype)});
  check.contiguous("latent", a.latent, "[batch, heads, s_q, d_latent]", {batch, heads, s_q, d_latent}, {dtype});
  check.contiguous("lse", a.lse, "[batch, heads, s_q]", {batch, heads, s_q}, {statistics(dtype)});
  check.contiguous("dq", a.dq, "like q", {batch, heads, s_q, a.q.size(3)}, {dtype});
  check.contiguous("dk", a.dk, "like k", {batch, heads, a.k.size(2), a.k.size(3)}, {dtype});
  check.contiguous("dv", a.dv, "like v", {batch, heads, a.v.size(2), a.v.size(3)}, {dtype});
  check.that(bool(a.wk) == bool(a.dwk), "dwk", "given exactly when wk is", describe(a.dwk));
  check.that(bool(a.wv) == bool(a.dwv), "dwv", "given exactly when wv is", describe(a.dwv));
  if (a.wk) check.contiguous("dwk", a.dwk, "[d_qk, d_latent]", {a.wk.size(0), d_latent}, {dtype});
  if (a.wv) check.contiguous("dwv", a.dwv, "[d_v, d_latent]", {a.wv.size(0), d_latent}, {dtype});
  check.on_device(a.q.device, {{"dout", a.dout},
                               {"dlatent", a.dlatent},
                               {"dlse", a.dlse},
                               {"k", a.k},
                               {"v", a.v},
                               {"wk", a.wk},
                               {"wv", a.wv},
                               {"latent", a.latent},
                               {"lse", a.lse},
                               {"dq", a.dq},
                               {"dk", a.dk},
                               {"dv", a.dv},
                               {"dwk", a.dwk},
                               {"dwv", a.dwv}});
}

}  // namespace

void flash_dmla(const FlashDmlaArgs& args, const Launch& launch) {
  check_args(args);
  if (args.lse.numel() == 0) return;
  forward(args, args.q.device, launch);
}

std::size_t flash_dmla_workspace(const FlashDmlaArgs&) { return 0; }

void flash_dmla_backward(const FlashDmlaBackwardArgs& args, const Launch& launch) {
  check_args(args);
  // No early return without queries: the other gradients must still become zero.
  backward(args, args.q.device, launch);
}

std::size_t flash_dmla_backward_workspace(const FlashDmlaBackwardArgs&) { return 0; }

}  // namespace dsm
