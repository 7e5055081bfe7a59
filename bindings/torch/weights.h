// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include "bindings/torch/convert.h"
#include "dsm/block_scales.h"
#include "dsm/error.h"

namespace dsm::binding {

/// The scales of a weight; `block` holds rows and columns of FP8 blocks, or nothing for formats that fix them.
inline BlockScales block_scales(const char* operation, const std::optional<Tensor>& scales,
                                const std::optional<Tensor>& global_scale, const std::vector<std::int64_t>& block) {
  BlockScales result{.scale = view(scales), .global = view(global_scale)};
  if (block.empty()) return result;
  if (block.size() != 2) throw Error(operation, "block", "rows and columns", std::to_string(block.size()) + " numbers");
  result.block_rows = block[0];
  result.block_columns = block[1];
  return result;
}

inline ActivationFormat activation_format_named(const char* operation, const std::string& name) {
  if (name == "none") return ActivationFormat::none;
  if (name == "fp8") return ActivationFormat::fp8;
  throw Error(operation, "activation_format", "none|fp8", "'" + name + "'");
}

}  // namespace dsm::binding
