// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Up to 16 heads have a kernel of their own (sparse_mla_decode_sm90_few_heads.cuh), and those of V3.2 another one where
// lists are long or bits must not depend on the batch (sparse_mla_decode_sm90_few_heads_v32.cuh); what follows is the
// one for more, and for plain rows. Calls so small that there is a multiprocessor for each block of keys of each 16
// heads take the former, unless bits must not depend on the batch.
//
// A thread block has 64 heads of one position and a run of blocks of 64 keys, of one request or of several. Four
// warpgroups: one makes scores, weights and half of the output's columns, one the other half; two turn cached rows into
// tiles of bfloat16 keys.
//
// Bound by the port of shared memory: 64 keys of V4 take 131 KB of it for the scores, 74 for the values, 65 to be
// written, 37 to arrive, i.e. 2500 to 2800 cycles at 128 bytes each, and the products alone 2048. Measured are 4500 to
// 5000. One warpgroup makes scores (1000 to 1400 cycles), weights (800 to 1100), hands them over (400 to 1700) and adds
// its values (1000 to 1300), one after another. Who brings keys takes as long: at batch 128, without scores, weights
// and values, 33.6 us of 40.4 (128 heads 96 of 117, V3.2 with 64 heads 93 of 105), and without conversion and stores,
// too, 21 (66, 43); with conversion left out but not the stores 38. Next to the scores, which take all of the port,
// their loads and stores stand still. Until the first keys are there a call takes 5 us (batch 2) to 8 us (128), where
// the queries and the first rows of all thread blocks, 13 MB, arrive together; its instructions count, as a chain of
// dependent ones takes 5 to 13 cycles each: what runs once is kept short.
//
// What did not help, with the time of V4, 64 heads, batch 128, where it was 40 to 41 us, unless it says otherwise:
// - Loads: asked for by four warps instead of eight; each piece as soon as its place is free; without allocating in the
//   L1 (13 % slower); fetched into the L2 a block ahead (1 to 7 % slower); registers touched early, so that nothing
//   waits for a load just asked for, which ptxas counts by the same scoreboard (as fast).
// - Copies instead: six of a lane's nine pieces asynchronously to places of its own (53); whole rows by bulk copies,
//   40 of them in what V4 leaves of shared memory, asked for by those who convert (4 to 6 % slower, as 8 rows take a
//   warp 1300 cycles to ask for; but V4.1 with FP4 40 instead of 49, now 42) or by one of eight warps (10 to 17 %).
// - Stores held back until the scores are made.
// - Two warpgroups that make scores and weights in turn, as in dense decode: they need 192 registers each and leave 64
//   to those that bring keys (60 instead of 49; with bulk copies 70).
// - Scores in a warpgroup of their own and half of the values in each of two (scores take 2500 cycles a block then,
//   values 2000), which leaves one to bring keys (5500 to 7000): copied asynchronously to where their values will be
//   (57; asked for by those who add values 51), by bulk copies 40 rows ahead (asked for by who makes scores 55, by
//   those who add values 50), and for 128 heads by pairs of thread blocks that convert half of the keys each and store
//   them in both (129 instead of 105).
// - Pairs of thread blocks that have half of the columns of queries, keys and values each and send each other their
//   part of the scores, with rows copied ahead into the memory left (58 instead of 46; 128 heads 124 instead of 117):
//   a row's address, its weights and the exchange cost both blocks instructions, of which the multiprocessor issues
//   no more.
// - Keys and values from registers, as V3.2's few heads have them (49): what converts them for the scores and once more
//   for the values takes the arithmetic units longer than the products, next to which these have half their rate (V3.2
//   94 instead of 105, but 128 heads at batch 2 27 instead of 20: more code begins a call).
// - The next block's scores queued behind this one's values (20 % slower: they hold up who brings keys); a quarter of
//   the columns instead of half for who makes the scores; half a block's keys given back early; maxima and sums in four
//   chains each (2 % slower); weights in the keys' own buffer, in two places, or stored by stmatrix (3 % slower to 1 %
//   faster).
// - At the beginning: queries asked for after the first indices or rows; parameters touched by all warps at once.
// - Pieces added up by the thread block of the request's first keys, which waits for the others' (3 us of 46 less with
//   lists of 1 to 512, but 192 registers do not do for it, which costs 10).
//
// H200, us end to end, keys of a first cache + a second one, beside the limit max(bytes / 4.3 TB/s, FLOP / 740 TFLOPS),
// L2 flushed by writing, whose lines are written back meanwhile (flushed by reading, 64 heads: batch 128 37.4, 148 55):
// V4, 64 heads, 128 + 512: batch 2 12.2 by tiles of 16 heads (15.3), 16 21.2 (1.9), 64 32.2 (7.5), 128 40.4 (15),
// 148 58.7 (17); at most 512 in the second cache: batch 64 28.9 (5.2), 128 43.2 (10). 128 heads, 128 + 1024: batch
// 64 58.0 (26), 128 104 (52). V3.2, 2048: 64 heads batch 128 101 (49), 128 heads batch 2 19.6, 64 95 (49), 128 177.
#include <algorithm>

#include "src/attention/sparse_mla_decode/plain_rows_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.h"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_consumer.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_few_heads.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_few_heads_v32.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_producer.cuh"
#include "src/core/kv_cache.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"

namespace dsm {
namespace {

using namespace sparse_mla_sm90;

constexpr int kThreads = 4 * kWarpgroup;
constexpr int kOverheadBlocks = 1;  // what beginning a request costs
constexpr int kLongPart = 7;        // blocks from which few heads of V3.2 have a kernel of their own
constexpr int kPlainHeads = 16;     // with fewer the portable kernel is as fast on plain rows, or faster

/// By a warpgroup, while it is found which are needed.
[[maybe_unused]] __device__ __forceinline__ void ask_for_few_indices(const Problem& p) {
  p.list.ask_for_few();
  if (p.keys.extra_keys > 0) p.extra.ask_for_few();
}

/// What the thread block computes, found by all of its threads; `scratch` is theirs.
[[maybe_unused]] __device__ __forceinline__ split_kv::Part own_part(const Problem& p, void* scratch) {
  if (p.keys.equal()) return p.equal.part(static_cast<int>(blockIdx.y), p.keys.batch);
  split_kv::Pieces* pieces = blockIdx.x == 0 && blockIdx.y == 0 ? p.pieces.pieces : nullptr;
  return split_kv::find_part(p.keys, blockIdx.y, scratch, pieces);
}

template <class Record, class Extra>
__global__ void __launch_bounds__(kThreads, 1) sparse_mla_decode_sm90_kernel(const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ std::uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<Record::kWidth>*>(memory + (-cuda::shared_address(memory) & 1023));
  if (threadIdx.x / kWarpgroup == 1) ask_for_few_indices(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kKeyBuffers; ++i) {
      shared.full[i].init(kBringingWarps<Record>);
      shared.empty[i].init(2 * kWarpgroup / 32);
    }
    cuda::fence_barrier_init();
  }
  __syncthreads();
  const split_kv::Part part = own_part(p, shared.keys);
  cuda::release_next_kernel();
  if (part.last_request < part.first_request) return;

  const int warpgroup = __shfl_sync(cuda::kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    cuda::take_registers<192>();
    weigh_keys(p, part, shared);
  } else if (warpgroup == 1) {
    cuda::take_registers<160>();
    weigh_other_half(p, part, shared);
  } else {
    cuda::give_registers<80>();
    bring_keys<Record, Extra>(p, part, shared);
  }
#endif
}

template <class Record, class Extra>
__global__ void __launch_bounds__(FewHeads<Record, Extra>::kThreads, 1)
    sparse_mla_decode_few_heads_sm90_kernel(const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Few = FewHeads<Record, Extra>;
  extern __shared__ std::uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Few::Shared*>(memory + (-cuda::shared_address(memory) & 1023));
  if (threadIdx.x / kWarpgroup == 1) ask_for_few_indices(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kKeyBuffers; ++i) {
      for (int lot = 0; lot < 2; ++lot) {
        shared.full[i][lot].init(kConverters);
        shared.empty[i][lot].init(Few::kWarps);
      }
    }
    for (auto& rows : shared.rows) rows.init(kConverters / kCopiers);
    cuda::fence_barrier_init();
  }
  const split_kv::Part part = own_part(p, shared.keys);
  cuda::release_next_kernel();
  if (part.last_request < part.first_request) return;

  // Everybody awaits the barriers' beginning; who copies asks for indices before.
  const auto await_barriers = [] { cuda::named_sync(0, Few::kThreads); };
  const int warp = __shfl_sync(cuda::kAllLanes, threadIdx.x / 32, 0) - Few::kWarps;
  if (warp < 0) {
    await_barriers();
    Few::weigh_keys(p, part, shared);
  } else if (warp < kConverters) {
    await_barriers();
    convert_rows<Record, Extra>(part, shared, warp);
  } else {
    copy_rows<Record, Extra, kCopiers>(p, part, shared, warp - kConverters, await_barriers);
  }
#endif
}

__global__ void __launch_bounds__(FewHeadsV32::kThreads, 1)
    sparse_mla_decode_few_heads_v32_sm90_kernel(const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Few = FewHeadsV32;
  extern __shared__ std::uint8_t memory[];
  auto& shared = *reinterpret_cast<Few::Shared*>(memory + (-cuda::shared_address(memory) & 1023));
  const split_kv::Part part = own_part(p, &shared);
  if (threadIdx.x == 0) shared.init();
  cuda::release_next_kernel();
  if (part.last_request < part.first_request) return;

  const auto await_barriers = [] { cuda::named_sync(0, Few::kThreads); };
  const int warp = __shfl_sync(cuda::kAllLanes, threadIdx.x / 32, 0) - Few::kAttending / 32;
  if (warp < -Few::kAdders / 32) {
    await_barriers();
    cuda::take_registers<120>();
    Few::make_weights(p, part, shared);
  } else if (warp < 0) {
    await_barriers();
    cuda::take_registers<104>();
    Few::add_values(p, part, shared);
  } else {
    cuda::give_registers<32>();
    copy_rows<KvV32Fp8, KvV32Fp8, kWarpgroup / 32>(p, part, shared, warp, await_barriers);
  }
#endif
}

int row_tiles(const SparseMlaDecodeArgs& a, int heads = kHeads) {
  return static_cast<int>(a.q.size(1)) * cuda::ceil_div(static_cast<int>(a.q.size(2)), heads);
}
/// Blocks of keys of a request.
std::int64_t blocks_of(const SparseMlaDecodeArgs& a) {
  const auto blocks = [](const TensorView& indices) {
    return indices ? cuda::ceil_div<std::int64_t>(indices.size(2), kKeys) : 0;
  };
  return blocks(a.indices) + blocks(a.extra_indices);
}
int parts_of(const SparseMlaDecodeArgs& a, int multiprocessors, int heads = kHeads) {
  return split_kv::parts_of(row_tiles(a, heads), multiprocessors, a.q.size(0), blocks_of(a), a.batch_invariant);
}
/// Heads of a thread block: of plain rows, and where bits must not depend on the batch, as many as it can have. Where
/// there are multiprocessors for all blocks of keys of all tiles of few heads, these are faster than more heads,
/// although each of them has the rows copied.
int heads_of_tile(const SparseMlaDecodeArgs& a, int multiprocessors) {
  constexpr int kFew = FewHeadsV32::kTileHeads;
  const bool few =
      a.q.size(2) <= kFew || (!a.batch_invariant && a.q.size(0) * blocks_of(a) * row_tiles(a, kFew) <=
                                                        std::min(multiprocessors, split_kv::kMostMultiprocessors));
  return few && kv_format(a.k_cache) ? kFew : kHeads;
}

List list_of(const TensorView& cache, const TensorView& indices) {
  const auto& of = indices.stride;
  return {.cache = Cache(cache),
          .indices = indices.as<const std::int32_t>(),
          .of_request = of[0],
          .of_position = of[1],
          .size = indices.numel() == 0
                      ? 0
                      : (indices.size(0) - 1) * of[0] + (indices.size(1) - 1) * of[1] + indices.size(2)};
}

template <class Record, class Extra>
void launch_decode(const SparseMlaDecodeArgs& a, const Launch& launch) {
  const char* name = "sparse_mla_decode";
  const bool two = static_cast<bool>(a.extra_k_cache);
  const auto batch = static_cast<int>(a.q.size(0));
  const int heads = heads_of_tile(a, cuda::multiprocessors(name)),
            parts = parts_of(a, cuda::multiprocessors(name), heads);
  const List list = list_of(a.k_cache, a.indices);
  const split_kv::Keys keys{.batch = batch,
                            .keys = static_cast<std::int32_t>(a.indices.size(2)),
                            .length = a.topk_length.as<const std::int32_t>(),
                            .extra_keys = two ? static_cast<std::int32_t>(a.extra_indices.size(2)) : 0,
                            .extra_length = a.extra_topk_length.as<const std::int32_t>(),
                            .overhead_blocks = kOverheadBlocks,
                            .invariant_pieces = a.batch_invariant ? split_kv::invariant_pieces(row_tiles(a)) : 0,
                            .parts = split_kv::Reciprocal(parts)};
  const split_kv::EqualRequests equal(keys);
  const bool adds_up = split_kv::cuts_requests(parts, batch, a.batch_invariant) && !(keys.equal() && equal.whole());
  split_kv::Workspace pieces = split_kv::Workspace::at(
      launch.workspace, batch, parts, split_kv::strips_of(a.q.size(1), a.q.size(2)), a.batch_invariant);
  if (!adds_up) pieces.pieces = nullptr;  // nobody reads them
  const Problem problem{
      .q = a.q.as<const __nv_bfloat16>(),
      .q_request = a.q.stride[0],
      .q_position = a.q.stride[1],
      .q_head = a.q.stride[2],
      .list = list,
      .extra = two ? list_of(a.extra_k_cache, a.extra_indices) : list,
      .keys = keys,
      .equal = equal,
      .pieces = pieces,
      .attn_sink = a.attn_sink.as<const float>(),
      .scale = static_cast<float>(a.softmax_scale) * kLog2e,
      .s_q = static_cast<int>(a.q.size(1)),
      .h_q = static_cast<int>(a.q.size(2)),
      .head_tiles = cuda::Divider(static_cast<std::uint32_t>(cuda::ceil_div<std::int64_t>(a.q.size(2), heads))),
      .out = a.out.as<__nv_bfloat16>(),
      .out_request = a.out.stride[0],
      .out_position = a.out.stride[1],
      .out_head = a.out.stride[2],
      .lse = a.lse.as<float>(),
  };
  const auto run = [&](auto* kernel, int threads, std::size_t shared) {
    const std::size_t bytes = shared + 1024;
    cuda::allow_shared_bytes(name, kernel, bytes);
    cuda::launch(name, kernel, dim3(row_tiles(a, heads), parts), dim3(threads), bytes, launch, problem);
  };
  const auto run_many = [&] {
    run(sparse_mla_decode_sm90_kernel<Record, Extra>, kThreads, sizeof(Shared<Record::kWidth>));
  };
  if constexpr (requires { typename Record::Element; }) {  // rows that are converted
    using Few = FewHeads<Record, Extra>;
    static_assert(std::max(sizeof(typename Few::Shared), sizeof(FewHeadsV32::Shared)) + 2048 <= 227 * 1024);
    if (heads == kHeads)
      run_many();
    else if (std::is_same_v<Record, KvV32Fp8> && (a.batch_invariant || batch * blocks_of(a) >= kLongPart * parts))
      run(sparse_mla_decode_few_heads_v32_sm90_kernel, FewHeadsV32::kThreads, sizeof(FewHeadsV32::Shared));
    else
      run(sparse_mla_decode_few_heads_sm90_kernel<Record, Extra>, Few::kThreads, sizeof(typename Few::Shared));
  } else {
    run_many();
  }
  if (adds_up)
    split_kv::combine(name, pieces, keys.equal() ? &equal : nullptr, a.q.size(1), a.attn_sink, a.out, a.lse, launch);
}

bool aligned(const TensorView& cache) {
  return reinterpret_cast<std::uintptr_t>(cache.data) % cuda::kPackBytes == 0 &&
         (cache.size(0) <= 1 || cache.stride[0] * element_size(cache.dtype) % cuda::kPackBytes == 0);
}

}  // namespace

Reason sparse_mla_decode_sm90_refusal(const SparseMlaDecodeArgs& a) {
  if (!cuda::is_hopper("sparse_mla_decode"))
    return "takes GPUs of compute capability 9.0, in a library built for sm_90a";
  const auto format = kv_format(a.k_cache), extra = kv_format(a.extra_k_cache ? a.extra_k_cache : a.k_cache);
  if (a.q.dtype != DType::bfloat16) return "takes bfloat16 queries";
  if ((!format && a.k_cache.dtype != DType::bfloat16) ||
      (!extra && a.extra_k_cache && a.extra_k_cache.dtype != DType::bfloat16))
    return "takes quantised and bfloat16 caches";
  if (format != extra && !(format == KvFormat::v41_fp8 && extra == KvFormat::v41_fp4))
    return "takes two caches of one format, or v41_fp8 and v41_fp4";
  if (!format && a.q.size(2) < kPlainHeads) return "takes bfloat16 caches for 16 heads or more";
  if (a.q.size(3) != 576 && a.q.size(3) != 512) return "takes d_qk = 576 and 512";
  if (!(static_cast<float>(a.softmax_scale) > 1e-30f)) return "takes softmax_scale > 1e-30";
  if (a.out.size(3) != kValues) return "takes d_v = 512";
  if (!cuda::packable({a.q, a.out})) return "takes queries and results in rows aligned to 16 bytes";
  if (!aligned(a.k_cache) || (a.extra_k_cache && !aligned(a.extra_k_cache)))
    return "takes caches of pages aligned to 16 bytes";
  if (split_kv::scratch_bytes(a.q.size(0)) > sizeof(Shared<512>::keys)) return "takes smaller batches";
  if (a.batch_invariant && parts_of(a, split_kv::kMostMultiprocessors) > split_kv::kMostParts)
    return "takes smaller batches with batch_invariant";
  if (row_tiles(a) > 1 << 20) return "takes fewer queries";
  if (a.q.size(0) * (blocks_of(a) + kOverheadBlocks) > INT32_MAX / 2) return "takes fewer than 2^36 keys in all";
  return "";
}

std::size_t sparse_mla_decode_sm90_workspace(const SparseMlaDecodeArgs& a) {
  if (a.lse.numel() == 0) return 0;
  const int parts = parts_of(a, split_kv::kMostMultiprocessors);
  const bool cuts = split_kv::cuts_requests(parts, a.q.size(0), a.batch_invariant);
  return split_kv::Workspace::bytes(a.q.size(0), parts, cuts ? split_kv::strips_of(a.q.size(1), a.q.size(2)) : 0,
                                    a.batch_invariant);
}

void sparse_mla_decode_sm90(const SparseMlaDecodeArgs& a, const Launch& launch) {
  const auto format = kv_format(a.k_cache);
  if (!format)
    return a.q.size(3) == 576 ? launch_decode<PlainRow<576>, PlainRow<576>>(a, launch)
                              : launch_decode<PlainRow<512>, PlainRow<512>>(a, launch);
  switch (*format) {
    case KvFormat::v32_fp8:
      return launch_decode<KvV32Fp8, KvV32Fp8>(a, launch);
    case KvFormat::v32_nvfp4:
      return launch_decode<KvV32Nvfp4, KvV32Nvfp4>(a, launch);
    case KvFormat::v4_fp8:
      return launch_decode<KvV4Fp8, KvV4Fp8>(a, launch);
    default:
      if (a.extra_k_cache && kv_format(a.extra_k_cache) == KvFormat::v41_fp4)
        return launch_decode<KvV41Fp8, KvV41Fp4>(a, launch);
      return launch_decode<KvV41Fp8, KvV41Fp8>(a, launch);
  }
}

}  // namespace dsm
