// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/indexer/hadamard_quantize/hadamard_quantize.h"

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<HadamardQuantizeArgs> forward("indexer", "hadamard_quantize",
                                             {{"cpu", DeviceType::cpu, hadamard_quantize_cpu}});

void check_args(const HadamardQuantizeArgs& a) {
  const Check check("hadamard_quantize");
  const bool fp8 = a.format == IndexerFormat::fp8;
  if (a.format == IndexerFormat::none) {
    check.tensor("x", a.x, "[rows, d]", {Check::kAny, Check::kAny}, kFloating);
  } else {
    check.tensor("x", a.x, "[rows, d]", {Check::kAny, Check::kAny}, {DType::float32, DType::bfloat16});
  }
  const std::int64_t rows = a.x.size(0), d = a.x.size(1);
  check.unit_last_stride("x", a.x);
  if (a.rotate) check.that(d > 0 && (d & (d - 1)) == 0, "d", "a power of two to be rotated", d);
  if (a.format == IndexerFormat::fp4) check.that(d % 32 == 0, "d", "a multiple of 32 in the format fp4", d);
  check.contiguous("y", a.y, "[rows, d]", {rows, d}, {fp8 ? DType::float8_e4m3fn : a.x.dtype});
  check.that(bool(a.scale) == fp8, "scale", "given exactly in the format fp8", describe(a.scale));
  if (fp8) check.contiguous("scale", a.scale, "[rows]", {rows}, {DType::float32});
  check.on_device(a.x.device, {{"y", a.y}, {"scale", a.scale}});
}

}  // namespace

void hadamard_quantize(const HadamardQuantizeArgs& args, const Launch& launch) {
  check_args(args);
  // No early return for d = 0 in the format fp8: each row still has a scale.
  if (args.x.size(0) == 0) return;
  forward(args, args.x.device, launch);
}

}  // namespace dsm
