// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include "dsm/tensor_view.h"

namespace dsm {

/// A token and the row of the cache it is stored in.
struct Placement {
  std::int64_t slot, token;
};

/// One placement for every slot that is named and is a row, with the last token that names it; so rows may be written
/// by several threads. In the order of slots.
std::vector<Placement> placements(const TensorView& slots, std::int64_t rows);

}  // namespace dsm
