// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/core/checks.h"

namespace dsm::hyper_connection {

inline DType wide(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

/// The streams, of at least one element: their mean square must exist.
inline void check_streams(const Check& check, const TensorView& x) {
  check.tensor("x", x, "[tokens, hc, hidden]", {Check::kAny, Check::kAny, Check::kAny}, kFloating);
  check.that(x.size(1) > 0 && x.size(2) > 0, "x", "at least 1 stream of at least 1 element", describe(x));
  check.unit_last_stride("x", x);
}

/// What hc_pre and hc_head share, forward and backward: a projection of `outputs` numbers with `scales` scales.
template <class Args>
void check_mixing(const Check& check, const Args& a, std::int64_t outputs, std::int64_t scales) {
  const std::int64_t tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2);
  const DType w = wide(a.x.dtype);
  check.contiguous("fn", a.fn, "[outputs, hc * hidden]", {outputs, hc * hidden}, {w});
  check.contiguous("base", a.base, "[outputs]", {outputs}, {w});
  check.contiguous("scale", a.scale, "[scales]", {scales}, {w});
  check.that(a.eps >= 0, "eps", "at least 0", std::to_string(a.eps));
  check.contiguous("mixes", a.mixes, "[tokens, outputs]", {tokens, outputs}, {w});
  check.contiguous("rstd", a.rstd, "[tokens]", {tokens}, {w});
  check.on_device(a.x.device,
                  {{"fn", a.fn}, {"base", a.base}, {"scale", a.scale}, {"mixes", a.mixes}, {"rstd", a.rstd}});
}

template <class Args>
void check_mixing_forward(const Check& check, const Args& a, std::int64_t outputs, std::int64_t scales) {
  check_mixing(check, a, outputs, scales);
  check.that(a.norm_eps >= 0, "norm_eps", "at least 0", std::to_string(a.norm_eps));
  check.contiguous("mixed", a.mixed, "[tokens, hidden]", {a.x.size(0), a.x.size(2)}, {a.x.dtype});
  check.on_device(a.x.device, {{"mixed", a.mixed}});
}

template <class Args>
void check_mixing_backward(const Check& check, const Args& a, std::int64_t outputs, std::int64_t scales) {
  check_mixing(check, a, outputs, scales);
  const std::int64_t tokens = a.x.size(0), hc = a.x.size(1), hidden = a.x.size(2);
  check.tensor("dmixed", a.dmixed, "[tokens, hidden]", {tokens, hidden}, {a.x.dtype});
  check.unit_last_stride("dmixed", a.dmixed);
  check.contiguous("dx", a.dx, "[tokens, hc, hidden]", {tokens, hc, hidden}, {a.x.dtype});
  check.contiguous("dfn", a.dfn, "[outputs, hc * hidden]", {outputs, hc * hidden}, {a.fn.dtype});
  check.contiguous("dbase", a.dbase, "[outputs]", {outputs}, {a.fn.dtype});
  check.contiguous("dscale", a.dscale, "[scales]", {scales}, {a.fn.dtype});
  check.on_device(a.x.device,
                  {{"dmixed", a.dmixed}, {"dx", a.dx}, {"dfn", a.dfn}, {"dbase", a.dbase}, {"dscale", a.dscale}});
}

}  // namespace dsm::hyper_connection
