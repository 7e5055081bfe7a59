// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/checks.h"

#include <algorithm>

#include "dsm/error.h"

namespace dsm {
namespace {

std::string bracketed(const std::int64_t* extents, int rank) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) {
    if (i) text += ", ";
    text += extents[i] == Check::kAny ? "any" : std::to_string(extents[i]);
  }
  return text + "]";
}

std::string join(Check::DTypes dtypes) {
  std::string text;
  for (const DType* dtype = dtypes.begin(); dtype != dtypes.end(); ++dtype)
    if (std::find(dtypes.begin(), dtype, *dtype) == dtype)
      text += (text.empty() ? "" : "|") + std::string(name(*dtype));
  return text;
}

}  // namespace

std::string describe(const TensorView& tensor) {
  if (!tensor) return "nothing";
  std::string text = bracketed(tensor.shape.data(), tensor.rank) + " " + name(tensor.dtype);
  return text + (tensor.device.type == DeviceType::cpu ? " on cpu" : " on cuda:" + std::to_string(tensor.device.index));
}

void Check::tensor(const char* argument, const TensorView& tensor, const char* shape_text,
                   std::initializer_list<std::int64_t> shape, DTypes dtypes) const {
  const int rank = static_cast<int>(shape.size());
  bool fits = tensor && tensor.rank == rank && std::find(dtypes.begin(), dtypes.end(), tensor.dtype) != dtypes.end();
  for (int i = 0; fits && i < rank; ++i) fits = shape.begin()[i] == kAny || shape.begin()[i] == tensor.shape[i];
  if (fits) return;
  fail(argument, std::string(shape_text) + " = " + bracketed(shape.begin(), rank) + " " + join(dtypes),
       describe(tensor));
}

void Check::contiguous(const char* argument, const TensorView& view, const char* shape_text,
                       std::initializer_list<std::int64_t> shape, DTypes dtypes) const {
  tensor(argument, view, shape_text, shape, dtypes);
  that(view.contiguous(), argument, "contiguous", "strides " + bracketed(view.stride.data(), view.rank));
}

void Check::unit_last_stride(const char* argument, const TensorView& tensor) const {
  that(tensor.numel() == 0 || tensor.size(-1) == 1 || tensor.stride[tensor.rank - 1] == 1, argument,
       "contiguous in its last dimension", "strides " + bracketed(tensor.stride.data(), tensor.rank));
}

void Check::on_device(const Device& device, std::initializer_list<Named> tensors) const {
  for (const auto& [argument, tensor] : tensors) {
    if (!tensor || tensor.device == device) continue;
    fail(argument, device.type == DeviceType::cpu ? "on cpu" : "on cuda:" + std::to_string(device.index),
         describe(tensor));
  }
}

void Check::aligned(const char* argument, const TensorView& tensor, int bytes) const {
  const auto misaligned = reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<unsigned>(bytes);
  that(!tensor || misaligned == 0, argument, "aligned to " + std::to_string(bytes) + " bytes",
       "an address " + std::to_string(misaligned) + " bytes off");
}

void Check::offsets(const char* argument, const TensorView& offsets, std::int64_t total) const {
  contiguous(argument, offsets, "[batch + 1]", {kAny}, {DType::int32});
  that(offsets.size(0) >= 1, argument, "[batch + 1]", describe(offsets));
  if (offsets.device.type != DeviceType::cpu) return;
  const std::int32_t* c = offsets.as<const std::int32_t>();
  that(c[0] >= 0, argument, "at least 0", c[0]);
  for (std::int64_t b = 1; b < offsets.size(0); ++b) {
    that(c[b] >= c[b - 1], argument, "not decreasing",
         std::to_string(c[b - 1]) + " before " + std::to_string(c[b]) + " at " + std::to_string(b));
  }
  const std::int32_t last = c[offsets.size(0) - 1];
  that(last <= total, argument, "at most the number of rows, " + std::to_string(total), last);
}

void Check::workspace(const Launch& launch, std::size_t bytes) const {
  const std::size_t given = launch.workspace ? launch.workspace_bytes : 0;
  that(given >= bytes, "workspace", "of at least " + std::to_string(bytes) + " bytes", std::to_string(given));
}

void Check::that(bool holds, const char* argument, const std::string& expected, const std::string& got) const {
  if (!holds) fail(argument, expected, got);
}

void Check::that(bool holds, const char* argument, const std::string& expected, std::int64_t got) const {
  if (!holds) fail(argument, expected, std::to_string(got));
}

void Check::fail(const char* argument, const std::string& expected, const std::string& got) const {
  throw Error(operation_, argument, expected, got);
}

}  // namespace dsm
