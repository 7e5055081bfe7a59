// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "dsm/tensor_view.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/index/divider.cuh"

namespace dsm {

/// Where the rows of a cache are, for kernels. The cache has rows.
class Pages {
 public:
  explicit Pages(const TensorView& cache)
      : data_(cache.as<std::uint8_t>()),
        page_bytes_(cache.stride[0] * element_size(cache.dtype)),
        page_size_(cache.size(1)),
        rows_(cache.size(0) * cache.size(1)),
        divider_(static_cast<std::uint32_t>(std::min(page_size_, kMostDivided))) {}

  /// Whether pages begin at multiples of 16 bytes. So do then the elements of every quantised row and its other parts,
  /// but for scales, which are aligned to 8 bytes at least.
  static bool aligned(const TensorView& cache) {
    return reinterpret_cast<std::uintptr_t>(cache.data) % cuda::kPackBytes == 0 &&
           (cache.size(0) == 1 || cache.stride[0] * element_size(cache.dtype) % cuda::kPackBytes == 0);
  }

  struct Place {
    std::uint8_t* page;
    std::int64_t page_size, entry;
  };

  __device__ bool valid(std::int64_t row) const { return row >= 0 && row < rows_; }

  /// Of a valid row. The first without a branch, between many loads.
  __device__ Place operator[](std::int32_t row) const {
    const auto number = static_cast<std::uint32_t>(row), page = divider_.quotient(number);
    return {data_ + page * page_bytes_, page_size_, std::int64_t{number - page * divider_.divisor()}};
  }
  __device__ Place operator[](std::int64_t row) const {
    if (row >> 31 == 0) return (*this)[static_cast<std::int32_t>(row)];
    const std::int64_t page = row / page_size_;
    return {data_ + page * page_bytes_, page_size_, row - page * page_size_};
  }

 private:
  static constexpr std::int64_t kMostDivided = std::int64_t{1} << 31;  // beyond which int32 rows are in the first page

  std::uint8_t* data_;
  std::int64_t page_bytes_, page_size_, rows_;
  cuda::Divider divider_;
};

}  // namespace dsm
