// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <optional>

#include "dsm/kv_cache.h"

namespace dsm::cpu {

/// The rows of a cache, plain or quantised (dsm/kv_cache.h), as floats or doubles. The cache must have passed
/// check_kv_cache. Different rows may be read and written by different threads.
class KvRows {
 public:
  explicit KvRows(const TensorView& cache);

  std::int64_t rows() const { return rows_; }
  std::int64_t width() const { return width_; }
  bool valid(std::int64_t index) const { return index >= 0 && index < rows_; }

  /// out[0 .. width) = the row's values; float or double. Exact but for plain float64 rows read as float.
  template <class A>
  void read(std::int64_t index, A* out) const;

  /// Stores a row of float or double values; quantised formats take them in float32. `scales` matters to
  /// KvFormat::v32_fp8 alone: the others have one rule.
  template <class A>
  void write(std::int64_t index, const A* values, KvScales scales = KvScales::ue8m0) const;

 private:
  std::uint8_t* page_of(std::int64_t index) const { return data_ + index / page_size_ * page_bytes_; }

  std::uint8_t* data_;
  DType dtype_;
  std::optional<KvFormat> format_;
  std::int64_t rows_, width_, page_size_, page_bytes_;
};

}  // namespace dsm::cpu
