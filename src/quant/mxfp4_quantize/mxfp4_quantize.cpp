// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/mxfp4_quantize/mxfp4_quantize.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<Mxfp4QuantizeArgs> quantize("quant", "mxfp4_quantize", {{"cpu", DeviceType::cpu, mxfp4_quantize_cpu}});

void check_args(const Mxfp4QuantizeArgs& a) {
  const Check check("mxfp4_quantize");
  check.tensor("x", a.x, "[matrices, rows, columns]", {Check::kAny, Check::kAny, Check::kAny}, kFloating);
  check.unit_last_stride("x", a.x);
  const std::int64_t matrices = a.x.size(0), rows = a.x.size(1), columns = a.x.size(2);
  check.that(columns % 32 == 0, "x", "of columns in a multiple of 32", columns);
  check.contiguous("packed", a.packed, "[matrices, rows, columns / 2]", {matrices, rows, columns / 2}, {DType::uint8});
  check.contiguous("scales", a.scales, "[matrices, rows, columns / 32]", {matrices, rows, columns / 32},
                   {DType::float8_e8m0fnu});
  check.on_device(a.x.device, {{"packed", a.packed}, {"scales", a.scales}});
}

}  // namespace

void mxfp4_quantize(const Mxfp4QuantizeArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.numel() == 0) return;
  quantize(args, args.x.device, launch);
}

}  // namespace dsm
