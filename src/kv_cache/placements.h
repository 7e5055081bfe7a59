// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
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

// On CUDA the last of several tokens with the same slot is found by comparing slots where there are few tokens, and
// otherwise by marks: a number per row of the cache, of which only those of the slots in question are ever touched.

inline constexpr std::int64_t kMaxUnmarkedTokens = 512;
inline constexpr std::int64_t kMaxCudaTokens = (std::int64_t{1} << 31) - 1;

/// Bytes of the marks.
std::size_t placements_workspace(const TensorView& slots, const TensorView& cache);

/// Why the CUDA implementations do not take so many tokens; empty if they do.
std::string too_many_for_cuda(const TensorView& slots);

}  // namespace dsm
