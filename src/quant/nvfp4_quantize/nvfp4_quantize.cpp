// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/nvfp4_quantize/nvfp4_quantize.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<Nvfp4QuantizeArgs> quantize("quant", "nvfp4_quantize", {{"cpu", DeviceType::cpu, nvfp4_quantize_cpu}});

void check_args(const Nvfp4QuantizeArgs& a) {
  const Check check("nvfp4_quantize");
  check.tensor("x", a.x, "[matrices, rows, columns]", {Check::kAny, Check::kAny, Check::kAny}, kFloating);
  check.unit_last_stride("x", a.x);
  const std::int64_t matrices = a.x.size(0), rows = a.x.size(1), columns = a.x.size(2);
  check.that(columns % 16 == 0, "x", "of columns in a multiple of 16", columns);
  if (a.given) check.contiguous("given", a.given, "[matrices]", {matrices}, {DType::float32});
  check.contiguous("packed", a.packed, "[matrices, rows, columns / 2]", {matrices, rows, columns / 2}, {DType::uint8});
  check.contiguous("scales", a.scales, "[matrices, rows, columns / 16]", {matrices, rows, columns / 16},
                   {DType::float8_e4m3fn});
  check.contiguous("global_scale", a.global_scale, "[matrices]", {matrices}, {DType::float32});
  check.on_device(a.x.device,
                  {{"given", a.given}, {"packed", a.packed}, {"scales", a.scales}, {"global_scale", a.global_scale}});
}

}  // namespace

void nvfp4_quantize(const Nvfp4QuantizeArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.size(0) == 0) return;  // matrices without elements still have a global scale
  quantize(args, args.x.device, launch);
}

}  // namespace dsm
