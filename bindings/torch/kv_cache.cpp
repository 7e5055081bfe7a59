// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/kv_cache.h"

#include <string>
#include <tuple>

#include "bindings/torch/convert.h"
#include "dsm/error.h"

namespace dsm::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

KvScales scales_named(const std::string& name) {
  if (name == "ue8m0") return KvScales::ue8m0;
  if (name == "fp32") return KvScales::fp32;
  throw Error("mla_kv_insert", "scale_format", "ue8m0|fp32", "'" + name + "'");
}

void mla_kv_insert(const Tensor& latent, const Tensor& k_pe, const Tensor& cache, const Tensor& slots,
                   const std::string& scale_format) {
  const MlaKvInsertArgs args{.latent = view(latent),
                             .k_pe = view(k_pe),
                             .slots = view(slots),
                             .scales = scales_named(scale_format),
                             .cache = view(cache)};
  Call call(latent, mla_kv_insert_workspace, args);
  dsm::mla_kv_insert(args, call.launch());
}

void v4_kv_insert(const Tensor& kv, const Tensor& cache, const Tensor& slots, const OptionalTensor& weight, double eps,
                  const OptionalTensor& positions, const OptionalTensor& inv_freq) {
  const V4KvInsertArgs args{.kv = view(kv),
                            .weight = view(weight),
                            .eps = eps,
                            .positions = view(positions),
                            .inv_freq = view(inv_freq),
                            .slots = view(slots),
                            .cache = view(cache)};
  Call call(kv, v4_kv_insert_workspace, args);
  dsm::v4_kv_insert(args, call.launch());
}

void indexer_k_insert(const Tensor& k, const Tensor& cache, const Tensor& slots) {
  const IndexerKInsertArgs args{.k = view(k), .slots = view(slots), .cache = view(cache)};
  Call call(k, indexer_k_insert_workspace, args);
  dsm::indexer_k_insert(args, call.launch());
}

Tensor kv_gather(const Tensor& cache, const Tensor& indices, ScalarType dtype) {
  Tensor out = empty(cache, {indices.numel(), kv_width(view(cache))}, dtype);
  Call call(cache);
  dsm::kv_gather({.cache = view(cache), .indices = view(indices), .out = view(out)}, call.launch());
  return out;
}

/// kv_compress without a state where the last three are absent.
std::tuple<Tensor, Tensor> compress(const Tensor& a, const Tensor& z, const Tensor& ape, const Tensor& cu_seqlens,
                                    bool overlap, const Tensor* start_positions, const Tensor* state,
                                    const Tensor* block_table) {
  const auto require = [](bool holds, const char* argument, const char* expected, const Tensor& got) {
    if (!holds) throw Error("kv_compress", argument, expected, describe(view(got)));
  };
  require(a.dim() == 2, "a", "of 2 dimensions", a);
  require(ape.dim() == 2 && ape.size(0) > 0, "ape", "[ratio, channels] with a ratio of at least 1", ape);
  require(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, "cu_seqlens", "[batch + 1]", cu_seqlens);
  const std::int64_t entries = kv_compress_entries(a.size(0), cu_seqlens.size(0) - 1, ape.size(0), !state);
  Tensor c = empty(a, {entries, a.size(1) / (overlap ? 2 : 1)}, a.scalar_type());
  Tensor tokens = empty(a, {entries}, ScalarType::Int);
  Call call(a);
  dsm::kv_compress({.a = view(a),
                    .z = view(z),
                    .ape = view(ape),
                    .cu_seqlens = view(cu_seqlens),
                    .overlap = overlap,
                    .start_positions = start_positions ? view(*start_positions) : TensorView(),
                    .state = state ? view(*state) : TensorView(),
                    .block_table = block_table ? view(*block_table) : TensorView(),
                    .c = view(c),
                    .tokens = view(tokens)},
                   call.launch());
  return {c, tokens};
}

std::tuple<Tensor, Tensor> kv_compress(const Tensor& a, const Tensor& z, const Tensor& ape, const Tensor& cu_seqlens,
                                       bool overlap) {
  return compress(a, z, ape, cu_seqlens, overlap, nullptr, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> kv_compress_chunk(const Tensor& a, const Tensor& z, const Tensor& ape,
                                             const Tensor& cu_seqlens, const Tensor& start_positions,
                                             const Tensor& state, const Tensor& block_table, bool overlap) {
  return compress(a, z, ape, cu_seqlens, overlap, &start_positions, &state, &block_table);
}

std::tuple<Tensor, Tensor, Tensor> kv_compress_backward(const Tensor& dc, const Tensor& a, const Tensor& z,
                                                        const Tensor& ape, const Tensor& cu_seqlens, bool overlap) {
  Tensor da = empty_like(a), dz = empty_like(z), dape = empty_like(ape);
  Call call(a);
  dsm::kv_compress_backward({.dc = view(dc),
                             .a = view(a),
                             .z = view(z),
                             .ape = view(ape),
                             .cu_seqlens = view(cu_seqlens),
                             .overlap = overlap,
                             .da = view(da),
                             .dz = view(dz),
                             .dape = view(dape)},
                            call.launch());
  return {da, dz, dape};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("mla_kv_insert(Tensor latent, Tensor k_pe, Tensor(a!) cache, Tensor slots, str scale_format) -> ()");
  m.def(
      "v4_kv_insert(Tensor kv, Tensor(a!) cache, Tensor slots, Tensor? weight, float eps, Tensor? positions, "
      "Tensor? inv_freq) -> ()");
  m.def("indexer_k_insert(Tensor k, Tensor(a!) cache, Tensor slots) -> ()");
  m.def("kv_gather(Tensor cache, Tensor indices, ScalarType dtype) -> Tensor");
  m.def("kv_compress(Tensor a, Tensor z, Tensor ape, Tensor cu_seqlens, bool overlap) -> (Tensor c, Tensor tokens)");
  m.def(
      "kv_compress_chunk(Tensor a, Tensor z, Tensor ape, Tensor cu_seqlens, Tensor start_positions, Tensor(a!) state, "
      "Tensor block_table, bool overlap) -> (Tensor c, Tensor tokens)");
  m.def(
      "kv_compress_backward(Tensor dc, Tensor a, Tensor z, Tensor ape, Tensor cu_seqlens, bool overlap) -> "
      "(Tensor da, Tensor dz, Tensor dape)");
}

#define DSM_IMPLEMENT(library)                                      \
  library.impl("mla_kv_insert", TORCH_BOX(&mla_kv_insert));         \
  library.impl("v4_kv_insert", TORCH_BOX(&v4_kv_insert));           \
  library.impl("indexer_k_insert", TORCH_BOX(&indexer_k_insert));   \
  library.impl("kv_gather", TORCH_BOX(&kv_gather));                 \
  library.impl("kv_compress", TORCH_BOX(&kv_compress));             \
  library.impl("kv_compress_chunk", TORCH_BOX(&kv_compress_chunk)); \
  library.impl("kv_compress_backward", TORCH_BOX(&kv_compress_backward));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
