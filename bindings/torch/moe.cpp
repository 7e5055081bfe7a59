// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/moe.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "bindings/torch/weights.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

Scoring scoring_named(const std::string& name) {
  if (name == "softmax") return Scoring::softmax;
  if (name == "sigmoid") return Scoring::sigmoid;
  if (name == "sqrtsoftplus") return Scoring::sqrtsoftplus;
  throw Error("moe_gate", "scoring", "softmax|sigmoid|sqrtsoftplus", "'" + name + "'");
}

Normalize normalize_named(const std::string& name) {
  if (name == "none") return Normalize::none;
  if (name == "selected") return Normalize::selected;
  if (name == "kept") return Normalize::kept;
  throw Error("moe_gate", "normalize", "none|selected|kept", "'" + name + "'");
}

/// A schema cannot return an optional tensor that Python understands everywhere: an absent one is empty.
Tensor empty_like_or_nothing(const OptionalTensor& like, const Tensor& reference) {
  return like ? empty_like(*like) : empty(reference, {0}, reference.scalar_type());
}

TensorView view_if(bool present, const Tensor& tensor) { return present ? view(tensor) : TensorView(); }

std::tuple<Tensor, Tensor> moe_gate(const Tensor& logits, std::int64_t topk, const OptionalTensor& bias,
                                    const OptionalTensor& token_ids, const OptionalTensor& tid2eid,
                                    const std::string& scoring, const std::string& normalize,
                                    double routed_scaling_factor, std::int64_t n_group, std::int64_t topk_group,
                                    std::int64_t capacity_rows) {
  const std::int64_t tokens = extent("moe_gate", "logits", logits, 0, 2);
  if (topk < 1) throw Error("moe_gate", "topk", "at least 1", std::to_string(topk));
  Tensor weights = empty(logits, {tokens, topk}, logits.scalar_type());
  Tensor indices = empty(logits, {tokens, topk}, ScalarType::Int);
  const MoeGateArgs args{.logits = view(logits),
                         .bias = view(bias),
                         .token_ids = view(token_ids),
                         .tid2eid = view(tid2eid),
                         .scoring = scoring_named(scoring),
                         .normalize = normalize_named(normalize),
                         .routed_scaling_factor = routed_scaling_factor,
                         .n_group = n_group,
                         .topk_group = topk_group,
                         .capacity_rows = capacity_rows,
                         .weights = view(weights),
                         .indices = view(indices)};
  Call call(logits, moe_gate_workspace, args);
  dsm::moe_gate(args, call.launch());
  return {weights, indices};
}

Tensor moe_gate_backward(const Tensor& dweights, const Tensor& logits, const Tensor& indices,
                         const std::string& scoring, const std::string& normalize, double routed_scaling_factor) {
  Tensor dlogits = empty_like(logits);
  Call call(logits);
  dsm::moe_gate_backward({.dweights = view(dweights),
                          .logits = view(logits),
                          .indices = view(indices),
                          .scoring = scoring_named(scoring),
                          .normalize = normalize_named(normalize),
                          .routed_scaling_factor = routed_scaling_factor,
                          .dlogits = view(dlogits)},
                         call.launch());
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_permute(const Tensor& x, const Tensor& indices, std::int64_t experts) {
  if (experts < 0) throw Error("moe_permute", "experts", "at least 0", std::to_string(experts));
  const std::int64_t tokens = extent("moe_permute", "indices", indices, 0, 2), pairs = tokens * indices.size(1);
  Tensor rows = empty(x, {pairs, extent("moe_permute", "x", x, 1, 2)}, x.scalar_type());
  Tensor expert_offsets = empty(indices, {experts + 1}, ScalarType::Int);
  Tensor row_of_slot = empty(indices, {tokens, indices.size(1)}, ScalarType::Int);
  Tensor slot_of_row = empty(indices, {pairs}, ScalarType::Int);
  Call call(x);
  dsm::moe_permute({.x = view(x),
                    .indices = view(indices),
                    .rows = view(rows),
                    .expert_offsets = view(expert_offsets),
                    .row_of_slot = view(row_of_slot),
                    .slot_of_row = view(slot_of_row)},
                   call.launch());
  return {rows, expert_offsets, row_of_slot, slot_of_row};
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool transpose_b,
                    const OptionalTensor& b_scales, const OptionalTensor& b_global_scale,
                    std::vector<std::int64_t> b_block, const std::string& activation_format) {
  Tensor c = empty(a, {extent("grouped_gemm", "a", a, 0, 2), extent("grouped_gemm", "b", b, transpose_b ? 1 : 2, 3)},
                   a.scalar_type());
  Call call(a);
  dsm::grouped_gemm({.a = view(a),
                     .b = view(b),
                     .b_scales = block_scales("grouped_gemm", b_scales, b_global_scale, b_block),
                     .expert_offsets = view(expert_offsets),
                     .transpose_b = transpose_b,
                     .activation_format = activation_format_named("grouped_gemm", activation_format),
                     .c = view(c)},
                    call.launch());
  return c;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(const Tensor& dc, const Tensor& a, const Tensor& b,
                                                 const Tensor& expert_offsets, bool transpose_b,
                                                 const OptionalTensor& b_scales, const OptionalTensor& b_global_scale,
                                                 std::vector<std::int64_t> b_block,
                                                 const std::string& activation_format, bool need_da, bool need_db) {
  Tensor da = empty_like_or_nothing(need_da ? OptionalTensor(a) : std::nullopt, a);
  Tensor db = empty_like_or_nothing(need_db ? OptionalTensor(b) : std::nullopt, a);
  Call call(a);
  dsm::grouped_gemm_backward({.dc = view(dc),
                              .a = view(a),
                              .b = view(b),
                              .b_scales = block_scales("grouped_gemm_backward", b_scales, b_global_scale, b_block),
                              .expert_offsets = view(expert_offsets),
                              .transpose_b = transpose_b,
                              .activation_format = activation_format_named("grouped_gemm_backward", activation_format),
                              .da = view_if(need_da, da),
                              .db = view_if(need_db, db)},
                             call.launch());
  return {da, db};
}

Tensor swiglu(const Tensor& z, double limit) {
  Tensor y = empty(z, {extent("swiglu", "z", z, 0, 2), z.size(1) / 2}, z.scalar_type());
  Call call(z);
  dsm::swiglu({.z = view(z), .limit = limit, .y = view(y)}, call.launch());
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& z, double limit) {
  Tensor dz = empty_like(z);
  Call call(z);
  dsm::swiglu_backward({.dy = view(dy), .z = view(z), .limit = limit, .dz = view(dz)}, call.launch());
  return dz;
}

Tensor moe_combine(const Tensor& rows, const Tensor& row_of_slot, const OptionalTensor& weights,
                   const OptionalTensor& shared) {
  Tensor y =
      empty(rows, {extent("moe_combine", "row_of_slot", row_of_slot, 0, 2), extent("moe_combine", "rows", rows, 1, 2)},
            rows.scalar_type());
  Call call(rows);
  dsm::moe_combine({.rows = view(rows),
                    .row_of_slot = view(row_of_slot),
                    .weights = view(weights),
                    .shared = view(shared),
                    .y = view(y)},
                   call.launch());
  return y;
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& dy, const Tensor& rows, const Tensor& row_of_slot,
                                                const OptionalTensor& weights) {
  Tensor drows = empty_like(rows);
  Tensor dweights = empty_like_or_nothing(weights, rows);
  Call call(rows);
  dsm::moe_combine_backward({.dy = view(dy),
                             .rows = view(rows),
                             .row_of_slot = view(row_of_slot),
                             .weights = view(weights),
                             .drows = view(drows),
                             .dweights = view_if(weights.has_value(), dweights)},
                            call.launch());
  return {drows, dweights};
}

/// Rows and columns of the blocks of w13, w2, shared_w13 and shared_w2, in this order; nothing where none is FP8.
class Blocks {
 public:
  Blocks(const char* operation, const std::vector<std::int64_t>& blocks) : operation_(operation), blocks_(blocks) {
    if (blocks.size() != 0 && blocks.size() != 8)
      throw Error(operation, "blocks", "of 8 numbers or none", std::to_string(blocks.size()));
  }

  BlockScales scales(int matrix, const OptionalTensor& scales, const OptionalTensor& global_scale) const {
    if (blocks_.empty()) return block_scales(operation_, scales, global_scale, {});
    return block_scales(operation_, scales, global_scale, {blocks_[2 * matrix], blocks_[2 * matrix + 1]});
  }

 private:
  const char* operation_;
  const std::vector<std::int64_t>& blocks_;
};

std::tuple<Tensor, Tensor, Tensor> moe_ffn(const Tensor& x, const Tensor& weights, const Tensor& indices,
                                           const Tensor& w13, const Tensor& w2, const OptionalTensor& shared_w13,
                                           const OptionalTensor& shared_w2, double swiglu_limit, bool keep_z,
                                           const OptionalTensor& w13_scales, const OptionalTensor& w13_global_scale,
                                           const OptionalTensor& w2_scales, const OptionalTensor& w2_global_scale,
                                           const OptionalTensor& shared_w13_scales,
                                           const OptionalTensor& shared_w13_global_scale,
                                           const OptionalTensor& shared_w2_scales,
                                           const OptionalTensor& shared_w2_global_scale,
                                           std::vector<std::int64_t> blocks, const std::string& activation_format) {
  const std::int64_t tokens = extent("moe_ffn", "x", x, 0, 2);
  const bool keep_shared = keep_z && shared_w13.has_value();
  const Blocks of("moe_ffn", blocks);
  Tensor y = empty_like(x);
  Tensor z =
      empty(x, {keep_z ? tokens * extent("moe_ffn", "indices", indices, 1, 2) : 0, extent("moe_ffn", "w13", w13, 1, 3)},
            x.scalar_type());
  Tensor shared_z =
      empty(x, {keep_shared ? tokens : 0, shared_w13 ? extent("moe_ffn", "shared_w13", *shared_w13, 0, 2) : 0},
            x.scalar_type());
  Call call(x);
  dsm::moe_ffn({.x = view(x),
                .weights = view(weights),
                .indices = view(indices),
                .w13 = view(w13),
                .w2 = view(w2),
                .shared_w13 = view(shared_w13),
                .shared_w2 = view(shared_w2),
                .w13_scales = of.scales(0, w13_scales, w13_global_scale),
                .w2_scales = of.scales(1, w2_scales, w2_global_scale),
                .shared_w13_scales = of.scales(2, shared_w13_scales, shared_w13_global_scale),
                .shared_w2_scales = of.scales(3, shared_w2_scales, shared_w2_global_scale),
                .swiglu_limit = swiglu_limit,
                .activation_format = activation_format_named("moe_ffn", activation_format),
                .y = view(y),
                .z = view_if(keep_z, z),
                .shared_z = view_if(keep_shared, shared_z)},
               call.launch());
  return {y, z, shared_z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_ffn_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& w13,
    const Tensor& w2, const OptionalTensor& shared_w13, const OptionalTensor& shared_w2, double swiglu_limit,
    const Tensor& z, const Tensor& shared_z, const OptionalTensor& w13_scales, const OptionalTensor& w13_global_scale,
    const OptionalTensor& w2_scales, const OptionalTensor& w2_global_scale, const OptionalTensor& shared_w13_scales,
    const OptionalTensor& shared_w13_global_scale, const OptionalTensor& shared_w2_scales,
    const OptionalTensor& shared_w2_global_scale, std::vector<std::int64_t> blocks,
    const std::string& activation_format, bool weight_gradients, bool shared_gradients) {
  const auto gradient_of = [&](const OptionalTensor& weight, bool wanted) {
    return empty_like_or_nothing(wanted ? weight : std::nullopt, x);
  };
  const bool shared = shared_w13.has_value();
  const Blocks of("moe_ffn_backward", blocks);
  Tensor dx = empty_like(x), dweights = empty_like(weights);
  Tensor dw13 = gradient_of(w13, weight_gradients), dw2 = gradient_of(w2, weight_gradients);
  Tensor dshared_w13 = gradient_of(shared_w13, shared_gradients), dshared_w2 = gradient_of(shared_w2, shared_gradients);
  Call call(x);
  dsm::moe_ffn_backward({.dy = view(dy),
                         .x = view(x),
                         .weights = view(weights),
                         .indices = view(indices),
                         .w13 = view(w13),
                         .w2 = view(w2),
                         .shared_w13 = view(shared_w13),
                         .shared_w2 = view(shared_w2),
                         .w13_scales = of.scales(0, w13_scales, w13_global_scale),
                         .w2_scales = of.scales(1, w2_scales, w2_global_scale),
                         .shared_w13_scales = of.scales(2, shared_w13_scales, shared_w13_global_scale),
                         .shared_w2_scales = of.scales(3, shared_w2_scales, shared_w2_global_scale),
                         .swiglu_limit = swiglu_limit,
                         .activation_format = activation_format_named("moe_ffn_backward", activation_format),
                         .z = view(z),
                         .shared_z = view_if(shared, shared_z),
                         .dx = view(dx),
                         .dweights = view(dweights),
                         .dw13 = view_if(weight_gradients, dw13),
                         .dw2 = view_if(weight_gradients, dw2),
                         .dshared_w13 = view_if(shared_gradients && shared, dshared_w13),
                         .dshared_w2 = view_if(shared_gradients && shared, dshared_w2)},
                        call.launch());
  return {dx, dweights, dw13, dw2, dshared_w13, dshared_w2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def(
      "moe_gate(Tensor logits, int topk, Tensor? bias, Tensor? token_ids, Tensor? tid2eid, str scoring, str normalize, "
      "float routed_scaling_factor, int n_group, int topk_group, SymInt capacity_rows) -> (Tensor weights, Tensor "
      "indices)");
  m.def(
      "moe_gate_backward(Tensor dweights, Tensor logits, Tensor indices, str scoring, str normalize, "
      "float routed_scaling_factor) -> Tensor dlogits");
  m.def(
      "moe_permute(Tensor x, Tensor indices, SymInt experts) -> "
      "(Tensor rows, Tensor expert_offsets, Tensor row_of_slot, Tensor slot_of_row)");
  m.def(
      "grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, bool transpose_b, Tensor? b_scales=None, Tensor? "
      "b_global_scale=None, SymInt[] b_block=[], str activation_format='none') -> Tensor c");
  m.def(
      "grouped_gemm_backward(Tensor dc, Tensor a, Tensor b, Tensor expert_offsets, bool transpose_b, Tensor? b_scales, "
      "Tensor? b_global_scale, SymInt[] b_block, str activation_format, bool need_da, bool need_db) -> (Tensor da, "
      "Tensor db)");
  m.def("swiglu(Tensor z, float limit) -> Tensor y");
  m.def("swiglu_backward(Tensor dy, Tensor z, float limit) -> Tensor dz");
  m.def("moe_combine(Tensor rows, Tensor row_of_slot, Tensor? weights, Tensor? shared) -> Tensor y");
  m.def(
      "moe_combine_backward(Tensor dy, Tensor rows, Tensor row_of_slot, Tensor? weights) -> "
      "(Tensor drows, Tensor dweights)");
  m.def(
      "moe_ffn(Tensor x, Tensor weights, Tensor indices, Tensor w13, Tensor w2, Tensor? shared_w13, Tensor? shared_w2, "
      "float swiglu_limit, bool keep_z, Tensor? w13_scales=None, Tensor? w13_global_scale=None, Tensor? "
      "w2_scales=None, Tensor? w2_global_scale=None, Tensor? shared_w13_scales=None, Tensor? "
      "shared_w13_global_scale=None, Tensor? shared_w2_scales=None, Tensor? shared_w2_global_scale=None, "
      "SymInt[] blocks=[], str activation_format='none') -> (Tensor y, Tensor z, Tensor shared_z)");
  m.def(
      "moe_ffn_backward(Tensor dy, Tensor x, Tensor weights, Tensor indices, Tensor w13, Tensor w2, Tensor? "
      "shared_w13, Tensor? shared_w2, float swiglu_limit, Tensor z, Tensor shared_z, Tensor? w13_scales, Tensor? "
      "w13_global_scale, Tensor? w2_scales, Tensor? w2_global_scale, Tensor? shared_w13_scales, Tensor? "
      "shared_w13_global_scale, Tensor? shared_w2_scales, Tensor? shared_w2_global_scale, SymInt[] blocks, str "
      "activation_format, bool weight_gradients, bool shared_gradients) -> "
      "(Tensor dx, Tensor dweights, Tensor dw13, Tensor dw2, Tensor dshared_w13, Tensor dshared_w2)");
}

#define DSM_IMPLEMENT(library)                                              \
  library.impl("moe_gate", TORCH_BOX(&moe_gate));                           \
  library.impl("moe_gate_backward", TORCH_BOX(&moe_gate_backward));         \
  library.impl("moe_permute", TORCH_BOX(&moe_permute));                     \
  library.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));                   \
  library.impl("grouped_gemm_backward", TORCH_BOX(&grouped_gemm_backward)); \
  library.impl("swiglu", TORCH_BOX(&swiglu));                               \
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));             \
  library.impl("moe_combine", TORCH_BOX(&moe_combine));                     \
  library.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));   \
  library.impl("moe_ffn", TORCH_BOX(&moe_ffn));                             \
  library.impl("moe_ffn_backward", TORCH_BOX(&moe_ffn_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
