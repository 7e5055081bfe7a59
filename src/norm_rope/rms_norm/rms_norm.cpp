// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/norm_rope/rms_norm/rms_norm.h"

#include <algorithm>
#include <cstdint>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

// The CUDA kernels count the elements of a row in 32 bits, with room for a step beyond its end.
constexpr std::int64_t kMaxCudaHidden = std::int64_t{1} << 30;

template <class Args>
Reason rows_fit(const Args& args) {
  return args.x.size(1) <= kMaxCudaHidden ? "" : "takes rows of at most 2^30 elements";
}

const Operator<RmsNormArgs> forward("norm_rope", "rms_norm",
                                    {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(rms_norm_cuda), rows_fit<RmsNormArgs>},
                                     {"cpu", DeviceType::cpu, rms_norm_cpu}});
const Operator<RmsNormBackwardArgs> backward("norm_rope", "rms_norm_backward",
                                             {{"cuda", DeviceType::cuda, DSM_CUDA_ROW(rms_norm_backward_cuda),
                                               rows_fit<RmsNormBackwardArgs>},
                                              {"cpu", DeviceType::cpu, rms_norm_backward_cpu}});

DType statistics(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// Float64 rows have no use for a float32 weight: gradients of it would lose what the caller asked float64 for.
void check_weight(const Check& check, const char* argument, const TensorView& weight, const TensorView& x) {
  const DType wide = statistics(x.dtype);
  check.contiguous(argument, weight, "[hidden]", {x.size(1)}, {x.dtype, wide});
}

void check_args(const RmsNormArgs& a) {
  const Check check("rms_norm");
  check.tensor("x", a.x, "[rows, hidden]", {Check::kAny, Check::kAny}, kFloating);
  const std::int64_t rows = a.x.size(0), hidden = a.x.size(1);
  check.unit_last_stride("x", a.x);
  if (a.weight) check_weight(check, "weight", a.weight, a.x);
  check.that(a.eps >= 0, "eps", "at least 0", std::to_string(a.eps));
  check.contiguous("y", a.y, "[rows, hidden]", {rows, hidden}, {a.x.dtype});
  check.contiguous("rstd", a.rstd, "[rows]", {rows}, {statistics(a.x.dtype)});
  check.on_device(a.x.device, {{"weight", a.weight}, {"y", a.y}, {"rstd", a.rstd}});
}

void check_args(const RmsNormBackwardArgs& a) {
  const Check check("rms_norm_backward");
  check.tensor("x", a.x, "[rows, hidden]", {Check::kAny, Check::kAny}, kFloating);
  const std::int64_t rows = a.x.size(0), hidden = a.x.size(1);
  check.unit_last_stride("x", a.x);
  check.tensor("dy", a.dy, "[rows, hidden]", {rows, hidden}, {a.x.dtype});
  check.unit_last_stride("dy", a.dy);
  check.contiguous("rstd", a.rstd, "[rows]", {rows}, {statistics(a.x.dtype)});
  check.contiguous("dx", a.dx, "[rows, hidden]", {rows, hidden}, {a.x.dtype});
  check.that(bool(a.weight) == bool(a.dweight), "dweight", "given exactly when weight is", describe(a.dweight));
  if (a.weight) {
    check_weight(check, "weight", a.weight, a.x);
    check.contiguous("dweight", a.dweight, "[hidden]", {hidden}, {a.weight.dtype});
  }
  check.on_device(a.x.device,
                  {{"dy", a.dy}, {"weight", a.weight}, {"rstd", a.rstd}, {"dx", a.dx}, {"dweight", a.dweight}});
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.size(0) == 0) return;
  forward(args, args.x.device, launch);
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Launch& launch) {
  check_args(args);
  Check("rms_norm_backward").workspace(launch, rms_norm_backward_workspace(args));
  // No early return for zero rows: dweight must still become zero.
  backward(args, args.x.device, launch);
}

std::size_t rms_norm_backward_workspace(const RmsNormBackwardArgs& args) {
  if (args.x.device.type == DeviceType::cpu || !args.dweight) return 0;
  const std::int64_t sums = std::min(args.x.size(0), kDweightPartials) * args.x.size(1);
  return static_cast<std::size_t>(sums) * element_size(statistics(args.x.dtype));
}

}  // namespace dsm
