// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/host_device.h"

// Sinkhorn-Knopp normalisation of an n x n matrix towards rows and columns that sum to 1, and its gradient, in float or
// double. One step divides every row, or every column, by its sum + eps. Columns come first (the softmax that makes the
// matrix has normalised its rows) and last: steps 0, 2, 4, … are columns, 1, 3, … rows.
// Source: Sinkhorn and Knopp 1967; Xie et al. 2025 (arXiv 2512.24880).

namespace dsm {

DSM_HD_INLINE int sinkhorn_steps(int iterations) { return 2 * iterations - 1; }

/// Elements of the record that the gradient needs: each step's result [n, n] and divisors [n].
DSM_HD_INLINE std::int64_t sinkhorn_record_size(int n, int iterations) {
  return std::int64_t{sinkhorn_steps(iterations)} * (n + 1) * n;
}

/// Normalises c [n, n] in place. A record of the given size is filled if not null.
template <class T>
DSM_HD_INLINE void sinkhorn(T* c, int n, int iterations, T eps, T* record = nullptr) {
  for (int step = 0; step < sinkhorn_steps(iterations); ++step) {
    const int line_stride = step % 2 ? n : 1, stride = step % 2 ? 1 : n;
    for (int line = 0; line < n; ++line) {
      T* const first = c + line * line_stride;
      T sum = 0;
      for (int i = 0; i < n; ++i) sum += first[i * stride];
      const T divisor = sum + eps;
      for (int i = 0; i < n; ++i) first[i * stride] /= divisor;
      if (record) record[n * n + line] = divisor;
    }
    if (!record) continue;
    for (int i = 0; i < n * n; ++i) record[i] = c[i];
    record += (n + 1) * n;
  }
}

/// Turns dc [n, n], the gradient of sinkhorn's result, into that of its argument.
template <class T>
DSM_HD_INLINE void sinkhorn_backward(const T* record, int n, int iterations, T* dc) {
  for (int step = sinkhorn_steps(iterations) - 1; step >= 0; --step) {
    const T* const c = record + std::int64_t{step} * (n + 1) * n;
    const int line_stride = step % 2 ? n : 1, stride = step % 2 ? 1 : n;
    for (int line = 0; line < n; ++line) {
      const int first = line * line_stride;
      T dot = 0;
      for (int i = 0; i < n; ++i) dot += rounded_product(dc[first + i * stride], c[first + i * stride]);
      for (int i = 0; i < n; ++i) dc[first + i * stride] = (dc[first + i * stride] - dot) / c[n * n + line];
    }
  }
}

}  // namespace dsm
