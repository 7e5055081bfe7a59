// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/moe/moe_ffn/moe_ffn.h"

#include <limits>
#include <string>

#include "src/core/checks.h"
#include "src/core/registry.h"
#include "src/core/weight_checks.h"

namespace dsm {
namespace {

const Operator<MoeFfnArgs> forward("moe", "moe_ffn", {{"cpu", DeviceType::cpu, moe_ffn_cpu}});
const Operator<MoeFfnBackwardArgs> backward("moe", "moe_ffn_backward",
                                            {{"cpu", DeviceType::cpu, moe_ffn_backward_cpu}});

DType wide(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

/// What both directions are given; Args is MoeFfnArgs or MoeFfnBackwardArgs.
template <class Args>
void check_inputs(const Check& check, const Args& a) {
  check.tensor("x", a.x, "[tokens, hidden]", {Check::kAny, Check::kAny}, kFloating);
  check.unit_last_stride("x", a.x);
  const std::int64_t tokens = a.x.size(0), hidden = a.x.size(1);
  check.contiguous("indices", a.indices, "[tokens, topk]", {tokens, Check::kAny}, {DType::int32});
  const std::int64_t topk = a.indices.size(1);
  check.that(tokens * (topk + 1) <= std::numeric_limits<std::int32_t>::max(), "tokens * (topk + 1)", "below 2^31",
             tokens * (topk + 1));
  check.contiguous("weights", a.weights, "[tokens, topk]", {tokens, topk}, {wide(a.x.dtype)});
  check_weight(check, "w13", a.w13, a.w13_scales, "[experts, 2 * intermediate, hidden]",
               {Check::kAny, Check::kAny, hidden}, a.x.dtype);
  const std::int64_t experts = a.w13.size(0), columns = a.w13.size(1);
  check.that(columns % 2 == 0, "w13", "of an even number of rows, the gates and then the ups", columns);
  check_weight(check, "w2", a.w2, a.w2_scales, "[experts, hidden, intermediate]", {experts, hidden, columns / 2},
               a.x.dtype);
  check.that(a.shared_w13 || !(a.shared_w13_scales || a.shared_w2_scales), "shared_w13", "given where its scales are",
             describe(a.shared_w13));
  check.that(bool(a.shared_w13) == bool(a.shared_w2), "shared_w2", "given exactly when shared_w13 is",
             describe(a.shared_w2));
  if (a.shared_w13) {
    check_weight(check, "shared_w13", a.shared_w13, a.shared_w13_scales, "[2 * shared_intermediate, hidden]",
                 {Check::kAny, hidden}, a.x.dtype);
    const std::int64_t shared_columns = a.shared_w13.size(0);
    check.that(shared_columns % 2 == 0, "shared_w13", "of an even number of rows, the gates and then the ups",
               shared_columns);
    check_weight(check, "shared_w2", a.shared_w2, a.shared_w2_scales, "[hidden, shared_intermediate]",
                 {hidden, shared_columns / 2}, a.x.dtype);
  }
  check.that(a.swiglu_limit > 0, "swiglu_limit", "above 0", std::to_string(a.swiglu_limit));
  if (a.z) check.contiguous("z", a.z, "[tokens * topk, 2 * intermediate]", {tokens * topk, columns}, {a.x.dtype});
  check.that(bool(a.shared_z) == (bool(a.z) && bool(a.shared_w13)), "shared_z",
             "given exactly when z and shared_w13 are", describe(a.shared_z));
  if (a.shared_z)
    check.contiguous("shared_z", a.shared_z, "[tokens, 2 * shared_intermediate]", {tokens, a.shared_w13.size(0)},
                     {a.x.dtype});
  check.on_device(a.x.device, {{"weights", a.weights},
                               {"indices", a.indices},
                               {"w13", a.w13},
                               {"w2", a.w2},
                               {"shared_w13", a.shared_w13},
                               {"shared_w2", a.shared_w2},
                               {"z", a.z},
                               {"shared_z", a.shared_z}});
}

void check_args(const MoeFfnArgs& a) {
  const Check check("moe_ffn");
  check_inputs(check, a);
  check.contiguous("y", a.y, "[tokens, hidden]", {a.x.size(0), a.x.size(1)}, {a.x.dtype});
  check.on_device(a.x.device, {{"y", a.y}});
}

void check_gradient(const Check& check, const char* argument, const TensorView& gradient, const TensorView& like) {
  const bool fits = gradient.rank == like.rank && gradient.shape == like.shape && gradient.dtype == like.dtype &&
                    gradient.contiguous();
  check.that(fits, argument, "contiguous, like " + describe(like), describe(gradient));
}

/// The gradients of an expert's two matrices: both or neither, and neither where one of the matrices is quantised.
void check_gradients(const Check& check, const char* name13, const TensorView& dw13, const TensorView& w13,
                     const char* name2, const TensorView& dw2, const TensorView& w2, bool quantised) {
  check.that(bool(dw13) == bool(dw2), name2, std::string("given exactly when ") + name13 + " is", describe(dw2));
  if (!dw13) return;
  check.that(!quantised, name13, "absent for quantised weights", describe(dw13));
  check_gradient(check, name13, dw13, w13);
  check_gradient(check, name2, dw2, w2);
}

void check_args(const MoeFfnBackwardArgs& a) {
  const Check check("moe_ffn_backward");
  check_inputs(check, a);
  check.that(bool(a.z), "z", "the forward call's", "nothing");
  check.tensor("dy", a.dy, "[tokens, hidden]", {a.x.size(0), a.x.size(1)}, {a.x.dtype});
  check.unit_last_stride("dy", a.dy);
  check.contiguous("dx", a.dx, "[tokens, hidden]", {a.x.size(0), a.x.size(1)}, {a.x.dtype});
  check_gradient(check, "dweights", a.dweights, a.weights);
  check_gradients(check, "dw13", a.dw13, a.w13, "dw2", a.dw2, a.w2, a.w13_scales || a.w2_scales);
  check_gradients(check, "dshared_w13", a.dshared_w13, a.shared_w13, "dshared_w2", a.dshared_w2, a.shared_w2,
                  a.shared_w13_scales || a.shared_w2_scales);
  check.on_device(a.x.device, {{"dy", a.dy},
                               {"dx", a.dx},
                               {"dweights", a.dweights},
                               {"dw13", a.dw13},
                               {"dw2", a.dw2},
                               {"dshared_w13", a.dshared_w13},
                               {"dshared_w2", a.dshared_w2}});
}

}  // namespace

void moe_ffn(const MoeFfnArgs& args, const Launch& launch) {
  check_args(args);
  if (args.x.size(0) == 0) return;
  forward(args, args.x.device, launch);
}

void moe_ffn_backward(const MoeFfnBackwardArgs& args, const Launch& launch) {
  check_args(args);
  backward(args, args.x.device, launch);  // also without tokens: the weights' gradients must become zero
}

}  // namespace dsm
