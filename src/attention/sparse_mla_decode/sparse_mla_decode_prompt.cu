// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// A prompt: the queries of a request name each row so many times that it pays to dequantise the whole cache once, and
// to attend to the copy as sparse_mla_prefill does, which has no conversions between its products. Two caches become
// one copy, and their lists one. A bfloat16 cache is attended to where it is.
//
// H200, s_q 4096, us | by the decode kernel, which converts a row as often as it is named | FlashMLA: V3.2, topk 2048,
// 128 heads, 8192 rows 3384 | 4995 | 6592, 131072 rows 3909 | 5544 | 6889, 64 heads, 8192 rows 1721 | 2522 | 3402; V4,
// topk 512, 8192 rows, 64 heads 473 | 813 | 1081, 16 heads 406 | 627 | 1052. Of these dequantising is 4, or 59 for
// 131072 rows. 16 heads of V3.2 stay with the decode kernel, whose products take rows as they are: 1461 beside 1370,
// but 1491 beside 1838 with 131072 rows, which are half as large as copies, and with smaller errors.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "dsm/kv_cache.h"
#include "dsm/sparse_mla.h"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_prompt.h"
#include "src/core/kv_cache.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/launch/launch.h"

namespace dsm {
namespace {

constexpr const char* kName = "sparse_mla_decode";
constexpr int kThreads = 256;
constexpr std::int64_t kValues = 512;      // d_v
constexpr std::int64_t kTileHeads = 64;    // that read a row together
constexpr std::int64_t kFewHeads = 16;     // that take the rows of V3.2 as they are
constexpr std::int64_t kLeastItems = 264;  // tiles of queries: some to each multiprocessor
constexpr std::int64_t kReadsOfRow = 16;   // by tiles, on average; it takes some 5 to make up for the copy

/// A cache's rows, and those of its lists that count.
struct Listed {
  const std::int32_t* indices;
  std::int64_t of_request, of_position;  ///< strides
  const std::int32_t* length;            ///< of requests, or null
  std::int32_t most, rows, first_row;    ///< first_row: where the rows begin in the copy

  /// By a thread block, to `to`; returns how many there are.
  __device__ int copy(int request, int position, std::int32_t* to) const {
    const int count = length ? min(max(length[request], 0), most) : most;
    const std::int32_t* const from = indices + request * of_request + position * of_position;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const std::int32_t row = from[i];
      to[i] = 0 <= row && row < rows ? first_row + row : -1;
    }
    return count;
  }
};

/// A query to a thread block: its lists become one, of so many rows of the copy.
__global__ void __launch_bounds__(kThreads)
    sparse_mla_decode_join_lists_cuda_kernel(Listed first, Listed second, cuda::Divider s_q, std::int32_t* lists,
                                             std::int32_t* lengths) {
  const auto query = blockIdx.x, request = s_q.quotient(query), position = query - request * s_q.divisor();
  std::int32_t* const list = lists + query * (std::int64_t{first.most} + second.most);
  int count = first.copy(request, position, list);
  count += second.copy(request, position, list + count);
  if (threadIdx.x == 0) lengths[query] = count;
}

std::int64_t rows_of(const TensorView& cache) { return cache ? cache.size(0) * cache.size(1) : 0; }
std::int64_t rows_of(const SparseMlaDecodeArgs& a) { return rows_of(a.k_cache) + rows_of(a.extra_k_cache); }
std::int64_t keys_of(const SparseMlaDecodeArgs& a) {
  return a.indices.size(2) + (a.extra_indices ? a.extra_indices.size(2) : 0);
}

bool quantised(const TensorView& cache) { return kv_format(cache).has_value(); }
/// Whether the only cache needs no copy.
bool reads_in_place(const SparseMlaDecodeArgs& a) {
  const TensorView& cache = a.k_cache;
  return !quantised(cache) && !a.extra_k_cache &&
         (cache.size(0) <= 1 || cache.stride[0] == cache.size(1) * cache.size(3));
}
bool joins_lists(const SparseMlaDecodeArgs& a) { return a.topk_length || a.extra_k_cache; }

/// Parts of the workspace, in bytes from its beginning.
struct Workspace {
  std::size_t lists, lengths, prefill;  ///< behind the rows

  explicit Workspace(const SparseMlaDecodeArgs& a) {
    const auto behind = [](std::size_t begin, std::int64_t bytes) {
      return cuda::ceil_div<std::size_t>(begin + bytes, 256) * 256;
    };
    const std::int64_t queries = joins_lists(a) ? a.q.size(0) * a.q.size(1) : 0, word = sizeof(std::int32_t);
    lists = behind(0, reads_in_place(a) ? 0 : rows_of(a) * a.q.size(3) * element_size(a.q.dtype));
    lengths = behind(lists, queries * keys_of(a) * word);
    prefill = behind(lengths, queries * word);
  }
};

/// Element `index` of a tensor's first dimension.
TensorView at(TensorView tensor, std::int64_t index) {
  tensor.data = tensor.as<std::uint8_t>() + index * tensor.stride[0] * element_size(tensor.dtype);
  --tensor.rank;
  std::copy_n(tensor.shape.begin() + 1, tensor.rank, tensor.shape.begin());
  std::copy_n(tensor.stride.begin() + 1, tensor.rank, tensor.stride.begin());
  return tensor;
}

TensorView transposed(TensorView matrix) {
  std::swap(matrix.shape[0], matrix.shape[1]);
  std::swap(matrix.stride[0], matrix.stride[1]);
  return matrix;
}

/// The rows that are attended to.
TensorView copied_rows(const SparseMlaDecodeArgs& a, void* workspace) {
  return {reads_in_place(a) ? a.k_cache.data : workspace, a.q.dtype, {rows_of(a), 1, a.q.size(3)}, a.q.device};
}

SparseMlaPrefillArgs prefill_of(const SparseMlaDecodeArgs& a, std::int64_t request, void* workspace) {
  const std::int64_t s_q = a.q.size(1), first = request * s_q;
  SparseMlaPrefillArgs prefill{.q = at(a.q, request),
                               .kv = copied_rows(a, workspace),
                               .indices = at(a.indices, request),
                               .attn_sink = a.attn_sink,
                               .softmax_scale = a.softmax_scale,
                               .out = at(a.out, request),
                               .lse = transposed(at(a.lse, request))};
  if (joins_lists(a)) {
    const Workspace parts(a);
    auto* const bytes = static_cast<std::uint8_t*>(workspace);
    const std::int64_t keys = keys_of(a);
    auto* const lists = reinterpret_cast<std::int32_t*>(bytes + parts.lists) + first * keys;
    auto* const lengths = reinterpret_cast<std::int32_t*>(bytes + parts.lengths) + first;
    prefill.indices = {lists, DType::int32, {s_q, keys}, a.q.device};
    prefill.topk_length = {lengths, DType::int32, {s_q}, a.q.device};
  }
  TensorView& lists = prefill.indices;  // of one key head
  lists.rank = 3;
  lists.shape = {s_q, 1, lists.shape[1]};
  lists.stride = {lists.stride[0], 0, lists.stride[1]};
  return prefill;
}

void copy_rows(const TensorView& cache, TensorView copy, std::int64_t first_row, const Launch& launch) {
  const std::int64_t width = copy.size(2);
  void* const to = copy.as<std::uint8_t>() + first_row * width * element_size(copy.dtype);
  kv_gather({.cache = cache, .out = {to, copy.dtype, {rows_of(cache), width}, copy.device}}, launch);
}

Listed listed(const TensorView& cache, const TensorView& indices, const TensorView& length, std::int64_t first_row) {
  if (!cache) return {};
  return {.indices = indices.as<const std::int32_t>(),
          .of_request = indices.stride[0],
          .of_position = indices.stride[1],
          .length = length.as<const std::int32_t>(),
          .most = static_cast<std::int32_t>(indices.size(2)),
          .rows = static_cast<std::int32_t>(rows_of(cache)),
          .first_row = static_cast<std::int32_t>(first_row)};
}

}  // namespace

Reason sparse_mla_decode_prompt_refusal(const SparseMlaDecodeArgs& a) {
  if (!cuda::is_hopper(kName)) return "takes GPUs of compute capability 9.0, in a library built for sm_90a";
  const std::int64_t s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3), rows = rows_of(a),
                     items = s_q * cuda::ceil_div(h_q, kTileHeads);
  if (items < kLeastItems) return "takes more queries of a request";
  if (h_q <= kFewHeads && kv_format(a.k_cache) == KvFormat::v32_fp8) return "takes more than 16 heads of V3.2";
  if (a.q.dtype != DType::bfloat16) return "takes bfloat16 queries";
  for (const TensorView& cache : {a.k_cache, a.extra_k_cache})
    if (cache && !quantised(cache) && cache.dtype != DType::bfloat16) return "takes quantised and bfloat16 caches";
  if (d_qk != 576 && d_qk != 512) return "takes d_qk = 576 and 512";
  if (a.out.size(3) != kValues) return "takes d_v = 512";
  if (!(static_cast<float>(a.softmax_scale) > 1e-30f)) return "takes softmax_scale > 1e-30";
  if (!cuda::packable({a.q, a.out, copied_rows(a, nullptr)})) return "takes rows aligned to 16 bytes";
  if (a.q.size(0) * items > INT32_MAX / 2 || keys_of(a) > 1 << 30 || rows > INT32_MAX) return "takes smaller calls";
  if (reads_in_place(a)) return "";
  if (a.batch_invariant) return "takes batch_invariant calls of one bfloat16 cache, which it does not copy";
  if (items * keys_of(a) < kReadsOfRow * rows) return "takes lists that name most rows many times";
  if (rows * d_qk > s_q * h_q * (d_qk + kValues)) return "takes caches of no more values than queries and results";
  return "";
}

std::size_t sparse_mla_decode_prompt_workspace(const SparseMlaDecodeArgs& a) {
  return Workspace(a).prefill + sparse_mla_prefill_workspace(prefill_of(a, 0, nullptr));
}

void sparse_mla_decode_prompt(const SparseMlaDecodeArgs& a, const Launch& launch) {
  const Workspace parts(a);
  auto* const workspace = static_cast<std::uint8_t*>(launch.workspace);
  if (!reads_in_place(a)) {
    const TensorView copy = copied_rows(a, workspace);
    copy_rows(a.k_cache, copy, 0, launch);
    if (a.extra_k_cache) copy_rows(a.extra_k_cache, copy, rows_of(a.k_cache), launch);
  }
  if (joins_lists(a)) {
    const std::int64_t s_q = a.q.size(1);
    cuda::launch(kName, sparse_mla_decode_join_lists_cuda_kernel, dim3(static_cast<unsigned>(a.q.size(0) * s_q)),
                 dim3(kThreads), 0, launch, listed(a.k_cache, a.indices, a.topk_length, 0),
                 listed(a.extra_k_cache, a.extra_indices, a.extra_topk_length, rows_of(a.k_cache)),
                 cuda::Divider(static_cast<std::uint32_t>(s_q)),
                 reinterpret_cast<std::int32_t*>(workspace + parts.lists),
                 reinterpret_cast<std::int32_t*>(workspace + parts.lengths));
  }
  Launch of_request = launch;
  of_request.workspace = workspace + parts.prefill;
  of_request.workspace_bytes -= parts.prefill;
  for (std::int64_t request = 0; request < a.q.size(0); ++request)
    sparse_mla_prefill(prefill_of(a, request, workspace), of_request);
}

}  // namespace dsm
