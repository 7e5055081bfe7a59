// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "bindings/torch/convert.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "dsm/error.h"

namespace dsm::binding {
namespace {

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::float8_e4m3fn;
    case ScalarType::Float8_e5m2:
      return DType::float8_e5m2;
    case ScalarType::Float8_e8m0fnu:
      return DType::float8_e8m0fnu;
    case ScalarType::Byte:
      return DType::uint8;
    case ScalarType::Char:
      return DType::int8;
    case ScalarType::Int:
      return DType::int32;
    case ScalarType::Long:
      return DType::int64;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      throw Error("dsm", "a tensor", "of a floating, int32, int64, uint8, int8 or bool dtype",
                  "torch scalar type number " + std::to_string(static_cast<int>(type)));
  }
}

// torch loads its CUDA library privately, so the entry point is looked up in the loaded library by name. A build
// against the CPU torch then serves the CUDA torch too.
void* current_stream(std::int32_t device) {
  using CurrentStream = AOTITorchError (*)(std::int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!function) throw Error("dsm", "torch", "a build with CUDA", "one without aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

}  // namespace

TensorView view(const Tensor& tensor) {
  TensorView result;
  result.rank = static_cast<int>(tensor.dim());
  if (result.rank > TensorView::kMaxRank)
    throw Error("dsm", "a tensor", "of at most 6 dimensions", std::to_string(result.rank));
  result.data = tensor.data_ptr();
  result.dtype = dtype_of(tensor.scalar_type());
  if (tensor.is_cuda()) {
    result.device = {DeviceType::cuda, tensor.get_device_index()};
  } else if (!tensor.is_cpu()) {
    throw Error("dsm", "a tensor", "on cpu or cuda", "another device");
  }
  for (int i = 0; i < result.rank; ++i) {
    result.shape[i] = tensor.size(i);
    result.stride[i] = tensor.stride(i);
  }
  return result;
}

TensorView view(const std::optional<Tensor>& tensor) { return tensor ? view(*tensor) : TensorView(); }

std::int64_t extent(const char* operation, const char* argument, const Tensor& tensor, int dim, int rank) {
  if (tensor.dim() != rank)
    throw Error(operation, argument, "of " + std::to_string(rank) + " dimensions", describe(view(tensor)));
  return tensor.size(dim);
}

Tensor empty(const Tensor& like, const std::vector<std::int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

Tensor empty(const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType dtype) {
  return empty(like, std::vector<std::int64_t>(shape), dtype);
}

Tensor empty_on_cpu(const std::vector<std::int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty({shape.data(), shape.size()}, dtype);
}

Tensor empty_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return empty(like, std::vector<std::int64_t>(sizes.begin(), sizes.end()), like.scalar_type());
}

ScalarType accumulator_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Call::Call(const Tensor& on) {
  if (on.is_cuda()) {
    const std::int32_t index = on.get_device_index();
    device_guard_.emplace(index);
    launch_.stream = current_stream(index);
  }
}

void Call::allocate(const Tensor& on, std::size_t bytes) {
  if (bytes == 0) return;
  workspace_ = empty(on, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
  launch_.workspace = workspace_->data_ptr();
  launch_.workspace_bytes = bytes;
}

}  // namespace dsm::binding
