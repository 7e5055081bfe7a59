// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <initializer_list>

#include "dsm/block_scales.h"
#include "src/core/checks.h"

namespace dsm {

/// Two 4-bit codes in a byte.
inline bool is_fp4(const TensorView& codes) { return codes.dtype == DType::uint8 || codes.dtype == DType::int8; }

/// Elements of a row of weights, floating or quantised.
inline std::int64_t weight_columns(const TensorView& weight) { return weight.size(-1) * (is_fp4(weight) ? 2 : 1); }

/// `weight` must hold matrices of the given shape [..., n, k] (Check::kAny matches every extent): contiguous and of
/// dtype `floating` where `scales` is absent, else one of the quantised formats of BlockScales.
void check_weight(const Check& check, const char* argument, const TensorView& weight, const BlockScales& scales,
                  const char* shape_text, std::initializer_list<std::int64_t> shape, DType floating);

}  // namespace dsm
