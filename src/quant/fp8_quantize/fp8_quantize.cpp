// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/fp8_quantize/fp8_quantize.h"

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/quant/blocks.h"

namespace dsm {
namespace {

const Operator<Fp8QuantizeArgs> quantize("quant", "fp8_quantize", {{"cpu", DeviceType::cpu, fp8_quantize_cpu}});

void check_args(const Fp8QuantizeArgs& a) {
  const Check check("fp8_quantize");
  check.tensor("x", a.x, "[matrices, rows, columns]", {Check::kAny, Check::kAny, Check::kAny}, kFloating);
  check.unit_last_stride("x", a.x);
  check.that(a.block_rows >= 1, "block_rows", "at least 1", a.block_rows);
  check.that(a.block_columns >= 1, "block_columns", "at least 1", a.block_columns);
  const std::int64_t matrices = a.x.size(0), rows = a.x.size(1), columns = a.x.size(2);
  check.contiguous("data", a.data, "[matrices, rows, columns]", {matrices, rows, columns}, {DType::float8_e4m3fn});
  check.contiguous("scales", a.scales, "[matrices, ceil(rows / block_rows), ceil(columns / block_columns)]",
                   {matrices, blocks_of(rows, a.block_rows), blocks_of(columns, a.block_columns)},
                   {DType::float8_e8m0fnu, DType::float32});
  check.on_device(a.x.device, {{"data", a.data}, {"scales", a.scales}});
}

}  // namespace

void fp8_quantize(const Fp8QuantizeArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.numel() == 0) return;
  quantize(args, args.x.device, launch);
}

}  // namespace dsm
