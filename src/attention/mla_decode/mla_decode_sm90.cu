// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "src/attention/mla_decode/mla_decode_sm90.cuh"
#include "src/attention/mla_decode/mla_decode_sm90.h"
#include "src/attention/mla_decode/mla_decode_sm90_consumer.cuh"
#include "src/cuda/copy/tensor_map.h"
#include "src/cuda/launch/launch.h"

namespace dsm {
namespace dense_decode {
namespace {

template <class T, bool kPair>
__global__ void __launch_bounds__(kThreads, 1)
    mla_decode_sm90_kernel(const __grid_constant__ Params params, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ std::uint8_t memory[];
  // By an offset: a pointer that was an integer would make all accesses generic ones.
  Shared& shared = *reinterpret_cast<Shared*>(memory + (-cuda::shared_address(memory) & 1023));
  const int first_row = blockIdx.x * kRows, part_number = blockIdx.y, rank = blockIdx.x % 2;
  const bool copies = threadIdx.x == 2 * kWarpgroup;
  if (copies) {
    cuda::prefetch_tensor_map(maps.q);
    cuda::prefetch_tensor_map(maps.k);
    cuda::prefetch_tensor_map(maps.k_last);
    shared.q_full.init(1);
    shared.q_empty.init(4);
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (cuda::MBarrier& full : shared.k_full[buffer]) full.init(1);
      for (cuda::MBarrier& empty : shared.k_empty[buffer]) empty.init(kPair ? 8 : 4);
    }
    cuda::fence_barrier_init();
  }
  __syncwarp();
  if constexpr (kPair) cuda::cluster_arrive();
  if (threadIdx.x >= kThreads - cuda::kWarpSize) ask_for_pages(params);
  const split_kv::Part part = split_kv::find_part(params.keys, part_number, shared.q,
                                                  part_number + first_row == 0 ? params.workspace.pieces : nullptr);
  cuda::release_next_kernel();
  if constexpr (kPair)
    cuda::cluster_wait();
  else
    __syncthreads();

  // The first block is asked for here: the instructions of this thread alone, elsewhere, are not in any cache yet.
  Copier<kPair> copier(params, maps, part, first_row, rank, shared);
  if (copies && copier.more()) copier.copy();

  if (threadIdx.x >= 2 * kWarpgroup) {
    cuda::give_registers<40>();
    if (copies) {
      while (copier.more()) copier.copy();
    } else if (threadIdx.x >= 2 * kWarpgroup + 32) {
      finish_empty<T>(params, part, first_row, threadIdx.x - 2 * kWarpgroup - 32, kWarpgroup - 32);
    }
  } else {
    cuda::take_registers<232>();
    Consumer<T, kPair>(params, shared, 2 * part_number, part.first_request, first_row, rank).run(part);
  }
  if constexpr (kPair) {
    __syncwarp();
    cuda::cluster_sync();  // the other block may still copy to this one and count here
  }
#endif
}

constexpr int kOverheadBlocks = 1;  // what beginning a request costs
static_assert(kMaxBatch * split_kv::kInvariantPieces <= split_kv::kMostParts);

std::int64_t tiles_of(const MlaDecodeArgs& a) { return cuda::ceil_div<std::int64_t>(a.q.size(1) * a.q.size(2), kRows); }

int parts_of(const MlaDecodeArgs& a, int multiprocessors) {
  return split_kv::parts_of(tiles_of(a), multiprocessors, a.q.size(0),
                            a.block_table.size(1) * a.k_cache.size(1) / kRows, a.batch_invariant);
}

template <class T>
void run(const MlaDecodeArgs& a, CUtensorMapDataType type, const Launch& on) {
  const char* operation = "mla_decode";
  const std::int64_t batch = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), rows = s_q * h_q, tiles = tiles_of(a);
  const std::int64_t page_size = a.k_cache.size(1), pages = a.k_cache.size(0);
  const int parts = parts_of(a, cuda::multiprocessors(operation));
  const auto& q = a.q.stride;
  const std::int64_t q_row = h_q > 1 ? q[2] : s_q > 1 ? q[1] : kQkColumns;
  const std::int64_t q_batch = batch > 1 ? q[0] : rows * kQkColumns,
                     page = pages > 1 ? a.k_cache.stride[0] : page_size * kQkColumns;
  const auto keys = [&](std::uint32_t tiles_at_once) {
    return cuda::tile_map_16bit(operation, type, a.k_cache.data, kQkColumns, page_size, pages, a.k_cache.stride[1],
                                page, kRows, tiles_at_once);
  };
  Params params{.heads = cuda::Divider(static_cast<std::uint32_t>(h_q))};
  params.keys = {.batch = static_cast<std::int32_t>(batch),
                 .keys = static_cast<std::int32_t>(a.block_table.size(1) * page_size),
                 .length = a.cache_seqlens.as<const std::int32_t>(),
                 .extra_keys = 0,
                 .extra_length = nullptr,
                 .overhead_blocks = kOverheadBlocks,
                 .invariant_pieces = a.batch_invariant ? split_kv::invariant_pieces(tiles) : 0,
                 .parts = split_kv::Reciprocal(static_cast<unsigned>(parts))};
  params.workspace =
      split_kv::Workspace::at(on.workspace, batch, parts, split_kv::strips_of(1, rows), a.batch_invariant);
  params.block_table = a.block_table.as<const std::int32_t>();
  params.table_stride = a.block_table.stride[0];
  params.table_size = a.block_table.size(1) == 0 ? 0 : (batch - 1) * a.block_table.stride[0] + a.block_table.size(1);
  params.page_blocks = static_cast<std::int32_t>(page_size / kRows);
  params.rows = static_cast<std::int32_t>(rows);
  params.s_q = static_cast<std::int32_t>(s_q);
  params.h_q = static_cast<std::int32_t>(h_q);
  params.causal = a.causal;
  params.scale = static_cast<float>(a.softmax_scale * M_LOG2E);
  params.out = a.out.data;
  params.out_batch = a.out.stride[0], params.out_position = a.out.stride[1], params.out_head = a.out.stride[2];
  params.lse = a.lse.as<float>();

  const Maps maps{
      .q = cuda::tile_map_16bit(operation, type, a.q.data, kQkColumns, rows, batch, q_row, q_batch, kRows, kTiles),
      .k = keys(2),
      .k_last = keys(1)};
  const bool pair = tiles % 2 == 0;
  auto* kernel = pair ? mla_decode_sm90_kernel<T, true> : mla_decode_sm90_kernel<T, false>;
  cuda::allow_shared_bytes(operation, kernel, kSharedBytes);
  cuda::launch_clusters(operation, kernel, dim3(tiles, parts), dim3(kThreads), pair ? 2 : 1, kSharedBytes, on, params,
                        maps);
  if (split_kv::cuts_requests(parts, batch, a.batch_invariant))
    split_kv::combine(operation, params.workspace, nullptr, 1, TensorView(), a.out, a.lse, on);
}

bool aligned(const TensorView& tensor) {
  bool result = reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0;
  for (int i = 0; i + 1 < tensor.rank; ++i)
    result &= tensor.shape[i] == 1 || (tensor.stride[i] > 0 && tensor.stride[i] % 8 == 0);
  return result;
}

}  // namespace
}  // namespace dense_decode

Reason mla_decode_sm90_refusal(const MlaDecodeArgs& a) {
  using namespace dense_decode;
  const auto& q = a.q;
  if (!cuda::is_hopper("mla_decode")) return "takes GPUs of compute capability 9.0, in a library built for sm_90a";
  if (!(a.softmax_scale > 0)) return "takes a softmax_scale above 0";
  if (q.dtype != DType::bfloat16 && q.dtype != DType::float16) return "takes float16 and bfloat16";
  if (a.k_cache.dtype != q.dtype) return "takes a cache of q's dtype";
  if (q.size(3) != kQkColumns || a.out.size(3) != kVColumns) return "takes d_qk = 576 and d_v = 512";
  if (a.k_cache.size(0) == 0 || a.k_cache.size(2) != 1) return "takes a cache with one head and at least one page";
  if (a.k_cache.size(1) % kRows != 0) return "takes pages of multiples of 64 rows";
  if (q.size(0) > kMaxBatch || q.size(1) * q.size(2) > 65535) return "takes up to 4096 requests of 65535 query rows";
  if (q.size(0) * (a.block_table.size(1) * a.k_cache.size(1) / kRows + kOverheadBlocks) > INT32_MAX / 2)
    return "takes fewer than 2^36 keys in all";
  if (q.size(1) > 1 && q.size(2) > 1 && q.stride[1] != q.size(2) * q.stride[2]) return "takes q with adjacent heads";
  if (!(static_cast<float>(a.softmax_scale) > 1e-30f)) return "takes softmax_scale > 1e-30";
  if (!aligned(q) || !aligned(a.k_cache) || !aligned(a.out)) return "takes rows at multiples of 16 bytes";
  return {};
}

std::size_t mla_decode_sm90_workspace(const MlaDecodeArgs& args) {
  using namespace dense_decode;
  if (args.lse.numel() == 0) return 0;
  const int parts = parts_of(args, split_kv::kMostMultiprocessors);
  const bool cuts = split_kv::cuts_requests(parts, args.q.size(0), args.batch_invariant);
  return split_kv::Workspace::bytes(
      args.q.size(0), parts, cuts ? split_kv::strips_of(1, args.q.size(1) * args.q.size(2)) : 0, args.batch_invariant);
}

void mla_decode_sm90(const MlaDecodeArgs& args, const Launch& launch) {
  args.q.dtype == DType::bfloat16 ? dense_decode::run<__nv_bfloat16>(args, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, launch)
                                  : dense_decode::run<__half>(args, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, launch);
}

}  // namespace dsm
