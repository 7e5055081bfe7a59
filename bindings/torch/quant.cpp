// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/quant.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

/// What the results' shapes are made of, before the operator has checked the rest.
void require_matrices(const char* operation, const char* argument, const Tensor& tensor) {
  if (tensor.dim() != 3) throw Error(operation, argument, "[matrices, rows, columns]", describe(view(tensor)));
}

void require_positive(const char* operation, const char* argument, std::int64_t value) {
  if (value < 1) throw Error(operation, argument, "at least 1", std::to_string(value));
}

std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return n / d + (n % d != 0); }

// The stable interface this is built for (torch 2.10) does not know E8M0: such tensors pass as uint8.
TensorView view_e8m0(const char* operation, const char* argument, const Tensor& tensor) {
  TensorView result = view(tensor);
  if (result.dtype != DType::uint8) throw Error(operation, argument, "E8M0 as uint8", describe(result));
  result.dtype = DType::float8_e8m0fnu;
  return result;
}

ScalarType scale_dtype(const std::string& format) {
  if (format == "ue8m0") return ScalarType::Byte;
  if (format == "fp32") return ScalarType::Float;
  throw Error("fp8_quantize", "scale_format", "ue8m0|fp32", "'" + format + "'");
}

MxRule rule_named(const std::string& name) {
  if (name == "ceil") return MxRule::ceil;
  if (name == "ocp") return MxRule::ocp;
  throw Error("mxfp4_quantize", "rule", "ceil|ocp", "'" + name + "'");
}

std::tuple<Tensor, Tensor> fp8_quantize(const Tensor& x, std::int64_t block_rows, std::int64_t block_columns,
                                        const std::string& scale_format) {
  require_matrices("fp8_quantize", "x", x);
  require_positive("fp8_quantize", "block_rows", block_rows);
  require_positive("fp8_quantize", "block_columns", block_columns);
  const std::int64_t matrices = x.size(0), rows = x.size(1), columns = x.size(2);
  Tensor data = empty(x, {matrices, rows, columns}, ScalarType::Float8_e4m3fn);
  Tensor scales =
      empty(x, {matrices, ceil_div(rows, block_rows), ceil_div(columns, block_columns)}, scale_dtype(scale_format));
  const bool power_of_two = scales.scalar_type() == ScalarType::Byte;
  Call call(x);
  dsm::fp8_quantize({.x = view(x),
                     .block_rows = block_rows,
                     .block_columns = block_columns,
                     .data = view(data),
                     .scales = power_of_two ? view_e8m0("fp8_quantize", "scales", scales) : view(scales)},
                    call.launch());
  return {data, scales};
}

std::tuple<Tensor, Tensor, Tensor> nvfp4_quantize(const Tensor& x, const std::optional<Tensor>& given) {
  require_matrices("nvfp4_quantize", "x", x);
  const std::int64_t matrices = x.size(0), rows = x.size(1), columns = x.size(2);
  Tensor packed = empty(x, {matrices, rows, columns / 2}, ScalarType::Byte);
  Tensor scales = empty(x, {matrices, rows, columns / 16}, ScalarType::Float8_e4m3fn);
  Tensor global_scale = empty(x, {matrices}, ScalarType::Float);
  Call call(x);
  dsm::nvfp4_quantize({.x = view(x),
                       .given = view(given),
                       .packed = view(packed),
                       .scales = view(scales),
                       .global_scale = view(global_scale)},
                      call.launch());
  return {packed, scales, global_scale};
}

std::tuple<Tensor, Tensor> mxfp4_quantize(const Tensor& x, const std::string& rule) {
  require_matrices("mxfp4_quantize", "x", x);
  const std::int64_t matrices = x.size(0), rows = x.size(1), columns = x.size(2);
  Tensor packed = empty(x, {matrices, rows, columns / 2}, ScalarType::Byte);
  Tensor scales = empty(x, {matrices, rows, columns / 32}, ScalarType::Byte);
  Call call(x);
  dsm::mxfp4_quantize({.x = view(x),
                       .rule = rule_named(rule),
                       .packed = view(packed),
                       .scales = view_e8m0("mxfp4_quantize", "scales", scales)},
                      call.launch());
  return {packed, scales};
}

std::tuple<Tensor, Tensor, Tensor> mxfp4_to_fp8(const Tensor& packed, const Tensor& group_scales,
                                                std::int64_t block_rows, std::int64_t block_columns) {
  require_matrices("mxfp4_to_fp8", "packed", packed);
  require_positive("mxfp4_to_fp8", "block_rows", block_rows);
  require_positive("mxfp4_to_fp8", "block_columns", block_columns);
  const std::int64_t matrices = packed.size(0), rows = packed.size(1), columns = 2 * packed.size(2);
  const std::int64_t down = ceil_div(rows, block_rows), across = ceil_div(columns, block_columns);
  Tensor data = empty(packed, {matrices, rows, columns}, ScalarType::Float8_e4m3fn);
  Tensor scales = empty(packed, {matrices, down, across}, ScalarType::Byte);
  Tensor exact = empty(packed, {matrices, down, across}, ScalarType::Bool);
  Call call(packed);
  dsm::mxfp4_to_fp8({.packed = view(packed),
                     .group_scales = view_e8m0("mxfp4_to_fp8", "group_scales", group_scales),
                     .block_rows = block_rows,
                     .block_columns = block_columns,
                     .data = view(data),
                     .scales = view_e8m0("mxfp4_to_fp8", "scales", scales),
                     .exact = view(exact)},
                    call.launch());
  return {data, scales, exact};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("fp8_quantize(Tensor x, int block_rows, int block_columns, str scale_format) -> (Tensor data, Tensor scales)");
  m.def("nvfp4_quantize(Tensor x, Tensor? global_scale) -> (Tensor packed, Tensor scales, Tensor used_global_scale)");
  m.def("mxfp4_quantize(Tensor x, str rule) -> (Tensor packed, Tensor scales)");
  m.def(
      "mxfp4_to_fp8(Tensor packed, Tensor group_scales, int block_rows, int block_columns) "
      "-> (Tensor data, Tensor scales, Tensor exact)");
}

#define DSM_IMPLEMENT(library)                                \
  library.impl("fp8_quantize", TORCH_BOX(&fp8_quantize));     \
  library.impl("nvfp4_quantize", TORCH_BOX(&nvfp4_quantize)); \
  library.impl("mxfp4_quantize", TORCH_BOX(&mxfp4_quantize)); \
  library.impl("mxfp4_to_fp8", TORCH_BOX(&mxfp4_to_fp8));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
