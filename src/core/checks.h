// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

/// Argument checks of one operator: each throws dsm::Error with operator, argument, expectation and what arrived.
class Check {
 public:
  /// Dtypes a tensor may have.
  using DTypes = std::initializer_list<DType>;
  static constexpr std::int64_t kAny = -1;

  explicit Check(const char* operation) : operation_(operation) {}

  /// `tensor` must be present, of the given shape (kAny matches every extent) and of one of the dtypes.
  /// `shape_text` names the dimensions, e.g. "[tokens, hidden]".
  void tensor(const char* argument, const TensorView& tensor, const char* shape_text,
              std::initializer_list<std::int64_t> shape, DTypes dtypes) const;

  /// As tensor(), and row-major without gaps.
  void contiguous(const char* argument, const TensorView& tensor, const char* shape_text,
                  std::initializer_list<std::int64_t> shape, DTypes dtypes) const;

  /// The elements of the last dimension must be adjacent.
  void unit_last_stride(const char* argument, const TensorView& tensor) const;

  /// Every present tensor must be on `device`.
  struct Named {
    const char* argument;
    const TensorView& tensor;
  };
  void on_device(const Device& device, std::initializer_list<Named> tensors) const;

  /// A present tensor's data must be a multiple of `bytes`.
  void aligned(const char* argument, const TensorView& tensor, int bytes) const;

  /// [batch + 1] int32 where packed sequences begin in `total` rows: at least 0, not decreasing, at most total. The
  /// contents are checked on the CPU only, where they can be read.
  void offsets(const char* argument, const TensorView& offsets, std::int64_t total) const;

  /// The workspace must hold `bytes`.
  void workspace(const Launch& launch, std::size_t bytes) const;

  void that(bool holds, const char* argument, const std::string& expected, const std::string& got) const;
  void that(bool holds, const char* argument, const std::string& expected, std::int64_t got) const;

  [[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) const;

 private:
  const char* operation_;
};

/// The dtypes of the training operators.
inline constexpr std::initializer_list<DType> kFloating = {DType::float64, DType::float32, DType::float16,
                                                           DType::bfloat16};

}  // namespace dsm
