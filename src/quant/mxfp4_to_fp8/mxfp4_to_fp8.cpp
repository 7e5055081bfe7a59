// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/quant/mxfp4_to_fp8/mxfp4_to_fp8.h"

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/quant/blocks.h"

namespace dsm {
namespace {

const Operator<Mxfp4ToFp8Args> cast("quant", "mxfp4_to_fp8", {{"cpu", DeviceType::cpu, mxfp4_to_fp8_cpu}});

void check_args(const Mxfp4ToFp8Args& a) {
  const Check check("mxfp4_to_fp8");
  check.contiguous("packed", a.packed, "[matrices, rows, columns / 2]", {Check::kAny, Check::kAny, Check::kAny},
                   {DType::uint8});
  const std::int64_t matrices = a.packed.size(0), rows = a.packed.size(1), columns = 2 * a.packed.size(2);
  check.that(columns % 32 == 0, "packed", "of columns in a multiple of 32", columns);
  check.contiguous("group_scales", a.group_scales, "[matrices, rows, columns / 32]", {matrices, rows, columns / 32},
                   {DType::float8_e8m0fnu});
  check.that(a.block_rows >= 1, "block_rows", "at least 1", a.block_rows);
  check.that(a.block_columns >= 1 && a.block_columns % 32 == 0, "block_columns", "a positive multiple of 32",
             a.block_columns);
  const std::int64_t down = blocks_of(rows, a.block_rows), across = blocks_of(columns, a.block_columns);
  const char* blocks = "[matrices, ceil(rows / block_rows), ceil(columns / block_columns)]";
  check.contiguous("data", a.data, "[matrices, rows, columns]", {matrices, rows, columns}, {DType::float8_e4m3fn});
  check.contiguous("scales", a.scales, blocks, {matrices, down, across}, {DType::float8_e8m0fnu});
  check.contiguous("exact", a.exact, blocks, {matrices, down, across}, {DType::boolean});
  check.on_device(a.packed.device,
                  {{"group_scales", a.group_scales}, {"data", a.data}, {"scales", a.scales}, {"exact", a.exact}});
}

}  // namespace

void mxfp4_to_fp8(const Mxfp4ToFp8Args& args, const Launch& launch) {
  check_args(args);
  if (args.data.numel() == 0) return;
  cast(args, args.packed.device, launch);
}

}  // namespace dsm
