// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>

#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90.cuh"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90.h"
#include "src/attention/sparse_mla_prefill/sparse_mla_prefill_sm90_few_heads.cuh"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/copy/tensor_map.h"
#include "src/cuda/launch/launch.h"

namespace dsm {
namespace {

constexpr const char* kName = "sparse_mla_prefill";

using Kernel = void (*)(sparse_prefill_sm90::Problem, CUtensorMap, CUtensorMap);

void launch_prefill(Kernel kernel, std::size_t shared_bytes, const sparse_prefill_sm90::Problem& problem,
                    const CUtensorMap& q, const CUtensorMap& out, const Launch& launch) {
  cuda::allow_shared_bytes(kName, kernel, shared_bytes);
  const std::int32_t blocks = std::min<std::int32_t>(problem.items, cuda::multiprocessors(kName));
  cuda::check(cudaMemsetAsync(problem.taken, 0, sizeof(*problem.taken), static_cast<cudaStream_t>(launch.stream)),
              kName);
  cuda::launch(kName, kernel, dim3(static_cast<unsigned>(blocks)), dim3(sparse_prefill_sm90::kThreads), shared_bytes,
               launch, problem, q, out);
}

template <class T, int kTiles>
void launch_prefill(const sparse_prefill_sm90::Problem& problem, const CUtensorMap& q, const CUtensorMap& out,
                    const Launch& launch) {
  using namespace sparse_prefill_sm90;
  if (problem.h_q <= kFewHeads)
    launch_prefill(sparse_mla_prefill_few_heads_sm90_kernel<T, kTiles>, sizeof(typename FewHeads<T, kTiles>::Shared),
                   problem, q, out, launch);
  else
    launch_prefill(sparse_mla_prefill_sm90_kernel<T, kTiles>, sizeof(Shared<kTiles>), problem, q, out, launch);
}

}  // namespace

Reason sparse_mla_prefill_sm90_refusal(const SparseMlaPrefillArgs& a) {
  if (!cuda::is_hopper(kName)) return "takes GPUs of compute capability 9.0, in a library built for sm_90a";
  if (a.q.dtype != DType::bfloat16 && a.q.dtype != DType::float16) return "takes bfloat16 and float16";
  if (a.q.size(2) != 576 && a.q.size(2) != 512) return "takes d_qk = 576 and 512";
  if (a.out.size(2) != 512) return "takes d_v = 512";
  if (a.kv.size(1) != 1) return "takes h_kv = 1";
  if (a.q.size(0) * cuda::ceil_div<std::int64_t>(a.q.size(1), sparse_prefill_sm90::kHeads) > INT32_MAX / 2)
    return "takes fewer queries";
  if (a.key_probs) return "gives no key_probs";
  if (!cuda::packable({a.q, a.kv, a.out})) return "takes rows at multiples of 16 bytes";
  if (!(static_cast<float>(a.softmax_scale) > 1e-30f)) return "takes softmax_scale > 1e-30";
  return "";
}

std::size_t sparse_mla_prefill_sm90_workspace(const SparseMlaPrefillArgs&) { return sizeof(std::int32_t); }

void sparse_mla_prefill_sm90(const SparseMlaPrefillArgs& a, const Launch& launch) {
  using sparse_prefill_sm90::Problem;
  const std::int64_t s_q = a.q.size(0), h_q = a.q.size(1);
  if (h_q == 0) return;
  const std::int64_t head_tiles = cuda::ceil_div<std::int64_t>(h_q, sparse_prefill_sm90::kHeads);
  const Problem problem{
      .q = a.q.data,
      .kv = a.kv.data,
      .kv_row = a.kv.stride[0],
      .indices = a.indices.as<const std::int32_t>(),
      .indices_token = a.indices.stride[0],
      .attn_sink = a.attn_sink.as<const float>(),
      .topk_length = a.topk_length.as<const std::int32_t>(),
      .max_logits = a.max_logits.as<float>(),
      .lse = a.lse.as<float>(),
      .lse_query = a.lse.stride[0],
      .lse_head = a.lse.stride[1],
      .items = static_cast<std::int32_t>(s_q * head_tiles),
      .taken = static_cast<std::int32_t*>(launch.workspace),
      .h_q = static_cast<std::int32_t>(h_q),
      .head_tiles = static_cast<std::int32_t>(head_tiles),
      .s_kv = static_cast<std::int32_t>(std::min<std::int64_t>(a.kv.size(0), INT32_MAX)),
      .topk = static_cast<std::int32_t>(a.indices.size(2)),
      .softmax_scale = static_cast<float>(a.softmax_scale),
  };
  const bool bfloat = a.q.dtype == DType::bfloat16;
  const auto map = [&](const TensorView& rows, std::uint32_t box_rows, std::uint32_t box_tiles) {
    const std::int64_t columns = rows.size(2);
    return cuda::tile_map_16bit(kName, bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                rows.data, columns, h_q, s_q, h_q > 1 ? rows.stride[1] : columns,
                                s_q > 1 ? rows.stride[0] : columns, box_rows, box_tiles);
  };
  const bool few = h_q <= sparse_prefill_sm90::kFewHeads;
  const bool wide = a.q.size(2) == 576;
  const CUtensorMap q = map(a.q, few ? sparse_prefill_sm90::kFewHeads : sparse_prefill_sm90::kHeads,
                            wide ? sparse_prefill_sm90::kQueryBox<9> : sparse_prefill_sm90::kQueryBox<8>),
                    out = map(a.out, 16, few ? 1 : 4);
  if (bfloat)
    wide ? launch_prefill<__nv_bfloat16, 9>(problem, q, out, launch)
         : launch_prefill<__nv_bfloat16, 8>(problem, q, out, launch);
  else
    wide ? launch_prefill<__half, 9>(problem, q, out, launch) : launch_prefill<__half, 8>(problem, q, out, launch);
}

}  // namespace dsm
