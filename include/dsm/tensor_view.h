// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "dsm/dtype.h"
#include "dsm/export.h"

namespace dsm {

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

/// A borrowed strided tensor: nothing is owned, copied or freed.
///
/// Strides count elements. A default-constructed view stands for an absent optional tensor.
struct TensorView {
  static constexpr int kMaxRank = 6;

  void* data = nullptr;
  DType dtype = DType::float32;
  Device device;
  int rank = -1;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};

  TensorView() = default;

  /// A contiguous (row-major) view.
  TensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape, Device device = {})
      : data(const_cast<void*>(data)), dtype(dtype), device(device), rank(static_cast<int>(shape.size())) {
    int i = 0;
    for (std::int64_t extent : shape) this->shape[i++] = extent;
    std::int64_t step = 1;
    for (i = rank - 1; i >= 0; --i) {
      stride[i] = step;
      step *= this->shape[i];
    }
  }

  /// False for an absent optional tensor.
  explicit operator bool() const { return rank >= 0; }

  std::int64_t numel() const {
    std::int64_t n = rank < 0 ? 0 : 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }

  /// Extent of a dimension; negative indices count from the last.
  std::int64_t size(int dim) const { return shape[dim < 0 ? dim + rank : dim]; }

  /// Row-major without gaps. A view without elements always is.
  bool contiguous() const {
    if (numel() == 0) return true;
    std::int64_t step = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != step) return false;
      step *= shape[i];
    }
    return true;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// "[8, 64, 1, 512] float16 on cuda:0", for messages.
DSM_API std::string describe(const TensorView& tensor);

}  // namespace dsm
