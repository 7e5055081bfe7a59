// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/quant_linear.h"

#include "src/core/weight_checks.h"

namespace dsm {
namespace {

constexpr auto kAny = Check::kAny;

void check_codes(const Check& check, const TensorView& weight, const BlockScales& scales, Check::DTypes codes) {
  const bool fp4 = *codes.begin() == DType::uint8;
  check.tensor("weight", weight, fp4 ? "[n, k / 2]" : "[n, k]", {kAny, kAny}, codes);
  check.that(bool(scales), "weight scales", "present", "nothing");
}

}  // namespace

void check_quant_linear(const Check& check, const QuantLinearArgs& a, Check::DTypes codes) {
  check.tensor("x", a.x, "[rows, k]", {kAny, kAny}, kFloating);
  check.unit_last_stride("x", a.x);
  check_codes(check, a.weight, a.scales, codes);
  check_weight(check, "weight", a.weight, a.scales, "[n, k]", {kAny, a.x.size(1)}, a.x.dtype);
  check.contiguous("y", a.y, "[rows, n]", {a.x.size(0), a.weight.size(0)}, {a.x.dtype});
  check.on_device(a.x.device, {{"weight", a.weight}, {"y", a.y}});
}

void check_quant_linear(const Check& check, const QuantLinearBackwardArgs& a, Check::DTypes codes) {
  check.tensor("dy", a.dy, "[rows, n]", {kAny, kAny}, kFloating);
  check.unit_last_stride("dy", a.dy);
  check_codes(check, a.weight, a.scales, codes);
  check_weight(check, "weight", a.weight, a.scales, "[n, k]", {a.dy.size(1), kAny}, a.dy.dtype);
  check.contiguous("dx", a.dx, "[rows, k]", {a.dy.size(0), weight_columns(a.weight)}, {a.dy.dtype});
  check.on_device(a.dy.device, {{"weight", a.weight}, {"dx", a.dx}});
}

}  // namespace dsm
