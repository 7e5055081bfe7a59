// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

namespace dsm {

/// How to run one operator call.
///
/// An operator never allocates device memory and never synchronises: `workspace` must hold at least
/// `<op>_workspace(args)` bytes (256-byte aligned, contents arbitrary) and stay alive until the work on
/// `stream` is done. The GPU of the tensors must be CUDA's current device in both calls. CPU calls ignore the stream
/// and return when the result is there.
struct Launch {
  void* stream = nullptr;  ///< cudaStream_t; null is the default stream
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  bool deterministic = true;  ///< false permits a faster implementation whose bits may differ between runs
};

}  // namespace dsm
