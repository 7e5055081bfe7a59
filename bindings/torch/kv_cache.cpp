// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "dsm/kv_cache.h"

#include <string>

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
  Call call(latent, mla_kv_insert_workspace(args));
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
  Call call(kv, v4_kv_insert_workspace(args));
  dsm::v4_kv_insert(args, call.launch());
}

void indexer_k_insert(const Tensor& k, const Tensor& cache, const Tensor& slots) {
  const IndexerKInsertArgs args{.k = view(k), .slots = view(slots), .cache = view(cache)};
  Call call(k, indexer_k_insert_workspace(args));
  dsm::indexer_k_insert(args, call.launch());
}

Tensor kv_gather(const Tensor& cache, const Tensor& indices, ScalarType dtype) {
  Tensor out = empty(cache, {indices.numel(), kv_width(view(cache))}, dtype);
  Call call(cache);
  dsm::kv_gather({.cache = view(cache), .indices = view(indices), .out = view(out)}, call.launch());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsm, m) {
  m.def("mla_kv_insert(Tensor latent, Tensor k_pe, Tensor(a!) cache, Tensor slots, str scale_format) -> ()");
  m.def(
      "v4_kv_insert(Tensor kv, Tensor(a!) cache, Tensor slots, Tensor? weight, float eps, Tensor? positions, "
      "Tensor? inv_freq) -> ()");
  m.def("indexer_k_insert(Tensor k, Tensor(a!) cache, Tensor slots) -> ()");
  m.def("kv_gather(Tensor cache, Tensor indices, ScalarType dtype) -> Tensor");
}

#define DSM_IMPLEMENT(library)                                    \
  library.impl("mla_kv_insert", TORCH_BOX(&mla_kv_insert));       \
  library.impl("v4_kv_insert", TORCH_BOX(&v4_kv_insert));         \
  library.impl("indexer_k_insert", TORCH_BOX(&indexer_k_insert)); \
  library.impl("kv_gather", TORCH_BOX(&kv_gather));

STABLE_TORCH_LIBRARY_IMPL(dsm, CPU, m){DSM_IMPLEMENT(m)} STABLE_TORCH_LIBRARY_IMPL(dsm, CUDA, m) { DSM_IMPLEMENT(m) }

}  // namespace dsm::binding
