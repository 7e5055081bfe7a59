// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The tensor as a view. The tensor must outlive every use of the view.
TensorView view(const Tensor& tensor);

/// As above; an absent tensor becomes an empty view.
TensorView view(const std::optional<Tensor>& tensor);

/// Extent of a dimension, before the operator has checked the rank.
std::int64_t extent(const char* operation, const char* argument, const Tensor& tensor, int dim, int rank);

/// A new contiguous tensor on the device of `like`, contents arbitrary.
Tensor empty(const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType dtype);
Tensor empty(const Tensor& like, const std::vector<std::int64_t>& shape, ScalarType dtype);

/// A new contiguous tensor for operators that take none, contents arbitrary.
Tensor empty_on_cpu(const std::vector<std::int64_t>& shape, ScalarType dtype);

/// A new contiguous tensor of the shape and dtype of `like`.
Tensor empty_like(const Tensor& like);

/// float64 for float64 tensors, float32 for the others: the dtype of statistics and accumulators.
ScalarType accumulator_dtype(const Tensor& tensor);

/// What one operator call needs besides its arguments: makes the tensor's device current, finds torch's current
/// stream, and takes the workspace from torch's allocator, so that a CUDA graph owns it.
class Call {
 public:
  explicit Call(const Tensor& on);

  /// With the workspace of the operator's <op>_workspace, which asks the device that is current by then.
  template <class Args>
  Call(const Tensor& on, std::size_t (*workspace)(const Args&), const Args& args) : Call(on) {
    allocate(on, workspace(args));
  }

  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Launch& launch() const { return launch_; }

 private:
  void allocate(const Tensor& on, std::size_t bytes);

  Launch launch_;
  std::optional<Tensor> workspace_;
  std::optional<torch::stable::accelerator::DeviceGuard> device_guard_;
};

}  // namespace dsm::binding
