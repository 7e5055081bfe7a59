// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include "dsm/kv_cache.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"
#include "src/attention/gathered_cuda.h"
#include "src/cuda/index/divider.cuh"
#include "src/numerics/float_traits.h"
#include "src/numerics/kv_record.h"
#include "src/numerics/softmax_merge.h"

// Attention over keys that lie scattered in memory, for every CUDA device: what mla_decode, sparse_mla_decode and
// sparse_mla_prefill have in common. Requests have s_q queries of h_q heads; the queries of a unit share a list of
// keys.
namespace dsm::attention {

/// How rows of keys are stored: in the queries' dtype, as E4M3 codes with one scale for all, as a record of
/// kv_record.h, or in another dtype than the queries'.
enum class RowFormat : std::uint8_t {
  plain,
  e4m3,
  v32_fp8,
  v32_nvfp4,
  v4_fp8,
  v41_fp8,
  v41_fp4,
  float32,
  float16,
  bfloat16,
};

inline RowFormat row_format(KvFormat format) {
  return static_cast<RowFormat>(static_cast<int>(RowFormat::v32_fp8) + static_cast<int>(format));
}

/// Of a cache that is not quantised by a format of kv_record.h.
inline RowFormat row_format(DType cache, DType queries) {
  if (cache == queries) return RowFormat::plain;
  switch (cache) {
    case DType::float32:
      return RowFormat::float32;
    case DType::float16:
      return RowFormat::float16;
    case DType::bfloat16:
      return RowFormat::bfloat16;
    default:
      return RowFormat::e4m3;
  }
}

/// Rows of keys and the lists of them. A row has a page and an entry in it; without pages there is one.
struct KeyPool {
  const std::uint8_t* data = nullptr;
  std::int64_t page_bytes = 0, row_bytes = 0, head_bytes = 0;  ///< from one to the next
  std::int64_t page_size = 1, pages = 0;
  cuda::Divider per_page{1};
  RowFormat format = RowFormat::plain;
  bool table = false;                                            ///< lists name pages, whose rows follow each other
  const std::int32_t* list = nullptr;                            ///< rows, or pages
  std::int64_t list_request = 0, list_query = 0, list_head = 0;  ///< strides
  std::int64_t listed = 0;                                       ///< keys of every list
  const std::int32_t* lengths = nullptr;                         ///< of each request, or null: all

  void set_pages(std::int64_t count, std::int64_t size) {
    constexpr std::int64_t most = std::int64_t{1} << 31;  // int32 numbers beyond it are in the first page
    pages = count, page_size = size;
    per_page = cuda::Divider(static_cast<std::uint32_t>(std::clamp<std::int64_t>(size, 1, most)));
  }

  __device__ int count(std::int64_t request) const {
    const std::int64_t given = lengths ? lengths[request] : listed;
    return static_cast<int>(min(max(given, std::int64_t{0}), listed));
  }
};

/// A row of keys in memory.
struct KeyRow {
  const std::uint8_t* data;    ///< null: no key
  const std::uint8_t* scales;  ///< of formats that keep them elsewhere
};

struct Strides {
  std::int64_t request, query, head;

  __host__ __device__ std::int64_t at(std::int64_t r, std::int64_t q, std::int64_t h) const {
    return r * request + q * query + h * head;
  }
};

/// From one index of a dimension to the next; 0 where there is but one, whose stride may be any number.
inline std::int64_t step(const TensorView& tensor, int dimension) {
  return tensor && tensor.size(dimension) > 1 ? tensor.stride[dimension] : 0;
}
inline std::int64_t step_bytes(const TensorView& tensor, int dimension) {
  return step(tensor, dimension) * static_cast<std::int64_t>(element_size(tensor.dtype));
}
/// Of a tensor [requests, queries, heads, …].
inline Strides strides(const TensorView& tensor) { return {step(tensor, 0), step(tensor, 1), step(tensor, 2)}; }

struct GatheredAttention {
  DType dtype;
  std::int64_t requests, s_q, h_q, h_kv, d_qk, d_v;
  bool own_lists;       ///< each query has a list; otherwise a request has one
  bool causal = false;  ///< of requests' lists: the last query sees all keys, the one before it all but one, …
  double softmax_scale;
  bool batch_invariant = false;
  const void* q;
  Strides q_strides;
  void* out;
  Strides out_strides;
  void *lse, *max_logits = nullptr;  ///< max_logits and what follows may be null
  Strides lse_strides;               ///< of max_logits, too
  const void* attn_sink = nullptr;
  const float* k_scale = nullptr;  ///< of E4M3 rows
  GatheredWork::Plan plan{1, 1};   ///< work().plan(), for attend_gathered_cuda()
  void* key_probs = nullptr;       ///< [requests, h_kv, listed]; needs own lists and one plain pool
  int pool_count = 1;
  KeyPool pools[2];
  cuda::Divider per_group{1}, per_list{1}, per_request{1},
      per_unit{1};  ///< rows of a query, units of a list, lists of a request, rows of a unit

  void set_dividers() {
    const auto divider = [](std::int64_t n) {
      return cuda::Divider(static_cast<std::uint32_t>(std::max<std::int64_t>(n, 1)));
    };
    per_group = divider(h_q / h_kv), per_list = divider(h_kv), per_request = divider(own_lists ? s_q : 1);
    per_unit = divider(rows());
  }

  /// Once the dividers are set.
  __host__ __device__ std::int64_t group() const { return per_group.divisor(); }
  __host__ __device__ std::int64_t queries() const { return own_lists ? 1 : s_q; }
  __host__ __device__ std::int64_t rows() const { return queries() * group(); }
  __host__ __device__ std::int64_t units() const { return requests * (own_lists ? s_q : 1) * h_kv; }
  GatheredWork work() const {
    const bool two = pool_count > 1;
    return {.requests = requests,
            .units = units(),
            .rows = rows(),
            .keys = pools[0].listed + (two ? pools[1].listed : 0),
            .d_v = d_v,
            .dtype = dtype,
            .grouped = element_size(dtype) == 2 && d_qk % 8 == 0 && d_qk <= kMostColumns && d_v <= kMostValues,
            .batch_invariant = batch_invariant};
  }
};

/// Results of a part of a unit's keys, in the workspace: outputs not yet divided by the sums of the states.
template <class A>
struct Parts {
  int count;
  std::int64_t rows, stride;
  A* out;     ///< [count, rows of all units, stride]
  A* states;  ///< [count, rows of all units, 2]: maximum and sum

  Parts(const GatheredAttention& p, const Launch& launch)
      : count(p.plan.splits),
        rows(p.units() * p.rows()),
        stride(p.work().part_stride()),
        out(static_cast<A*>(launch.workspace)),
        states(count > 1 ? out + count * rows * stride : nullptr) {}

  /// The first of a unit's tiles that a part has, or a group of threads where blocks have some; the next one's first
  /// is behind its last.
  __device__ int first_tile(unsigned part, int tiles, int groups = 1) const {
    const unsigned parts = count * groups;
    const unsigned each = static_cast<unsigned>(tiles) / parts, more = static_cast<unsigned>(tiles) % parts;
    return static_cast<int>(part * each + min(part, more));
  }
};

#ifdef __CUDACC__

/// One unit of the problem and the keys of it that a block of its query rows can see.
struct Unit {
  std::int64_t number, request;
  int query, kv_head, group;
  int count, extra_count, first_tiles, tiles;  ///< keys and tiles of keys of the first pool, of the second, of both
  const std::int32_t *list, *extra_list;
  cuda::Divider per_group{1};
  int seen_by_last;  ///< keys that the last query of the request sees; more than there are without a mask

  __device__ Unit(const GatheredAttention& p, std::uint32_t number, int last_row)
      : number(number), per_group(p.per_group) {
    group = static_cast<int>(p.per_group.divisor());
    const std::uint32_t nth_list = p.per_list.quotient(number), nth_request = p.per_request.quotient(nth_list);
    kv_head = static_cast<int>(number - nth_list * p.per_list.divisor());
    request = nth_request;
    query = static_cast<int>(nth_list - nth_request * p.per_request.divisor());
    seen_by_last =
        p.causal ? (p.pools[0].lengths ? p.pools[0].lengths[request] : static_cast<int>(p.pools[0].listed)) : INT32_MAX;
    count = p.pools[0].count(request);
    if (p.causal) count = min(count, seen(p, last_row));
    extra_count = p.pool_count > 1 ? p.pools[1].count(request) : 0;
    list = list_of(p.pools[0]), extra_list = list_of(p.pools[1]);
    first_tiles = (count + kTileKeys - 1) / kTileKeys;
    tiles = first_tiles + (extra_count + kTileKeys - 1) / kTileKeys;
  }

  __device__ int query_of(int row) const { return query + nth_query(row); }
  __device__ int head_of(int row) const { return kv_head * group + row - nth_query(row) * group; }
  /// The row's query among those of the unit.
  __device__ int nth_query(int row) const { return static_cast<int>(per_group.quotient(row)); }
  /// Keys that a row sees: those before this one.
  __device__ int seen(const GatheredAttention& p, int row) const {
    if (!p.causal) return INT32_MAX;
    return static_cast<int>(max(std::int64_t{seen_by_last} - (p.s_q - 1 - query_of(row)), std::int64_t{0}));
  }

  __device__ int pool_of(int tile) const { return tile >= first_tiles; }
  /// The number of a tile's key in its pool's list.
  __device__ int key(int tile, int i) const { return (tile - (pool_of(tile) ? first_tiles : 0)) * kTileKeys + i; }

  /// What the list says of a key: to be read well before row() needs it. −1: no key.
  __device__ std::int32_t fetch(const GatheredAttention& p, int tile, int i) const {
    if (tile >= tiles) return -1;
    const bool extra = pool_of(tile);
    const KeyPool& pool = p.pools[extra];
    const int k = key(tile, i);
    if (k >= (extra ? extra_count : count)) return -1;
    return (extra ? extra_list : list)[pool.table ? pool.per_page.quotient(static_cast<std::uint32_t>(k)) : k];
  }
  __device__ KeyRow row(const GatheredAttention& p, int tile, int i, std::int32_t fetched) const {
    const KeyPool& pool = p.pools[pool_of(tile)];
    const std::uint32_t number = pool.table ? key(tile, i) : fetched, in_page = pool.per_page.quotient(number);
    const std::int64_t page = pool.table ? fetched : static_cast<std::int64_t>(in_page);
    const std::int64_t entry = number - std::int64_t{in_page} * pool.page_size;
    if (fetched < 0 || page >= pool.pages) return {nullptr, nullptr};
    const std::uint8_t* data = pool.data + page * pool.page_bytes;
    return {data + entry * pool.row_bytes + kv_head * pool.head_bytes,
            data + pool.page_size * KvV4Fp8::kDataBytes + entry * KvV4Fp8::kScaleBytes};
  }

 private:
  __device__ const std::int32_t* list_of(const KeyPool& pool) const {
    return pool.list + request * pool.list_request + query * pool.list_query + kv_head * pool.list_head;
  }
};

template <class A>
__device__ __forceinline__ A* pointer(void* data, std::int64_t offset) {
  return static_cast<A*>(data) + offset;
}

/// What the unnormalised output of a row is multiplied by when its softmax is complete; 0: the output is 0, whatever
/// has been summed up.
template <class A>
__device__ A output_factor(const GatheredAttention& p, int head, A m, A l) {
  if (l == A(0)) return 0;
  return (p.attn_sink ? sink_factor(lse(SoftmaxState<A>{m, l}), static_cast<const A*>(p.attn_sink)[head]) : A(1)) / l;
}

/// Stores the statistics of a complete row.
template <class A>
__device__ void store_statistics(const GatheredAttention& p, std::int64_t request, int query, int head, A m, A l) {
  const std::int64_t at = p.lse_strides.at(request, query, head);
  *pointer<A>(p.lse, at) = l == A(0) ? kInfinity<A> : lse(SoftmaxState<A>{m, l});
  if (p.max_logits) *pointer<A>(p.max_logits, at) = m;
}

/// The probability that belongs to a score, −inf for none, of a row whose statistics are stored.
template <class A>
__device__ A probability(const GatheredAttention& p, std::int64_t request, int query, int head, A score) {
  const A total = *pointer<A>(p.lse, p.lse_strides.at(request, query, head));
  if (score == -kInfinity<A> || total == kInfinity<A>) return 0;
  return std::exp(score - total) * (p.attn_sink ? sink_factor(total, static_cast<const A*>(p.attn_sink)[head]) : A(1));
}

#endif

/// Bytes of workspace that the problem needs, by its shapes and dtypes alone.
inline std::size_t gathered_workspace(GatheredAttention problem) {
  if (problem.requests * problem.s_q * problem.h_q == 0) return 0;
  problem.set_dividers();
  return problem.work().workspace_bytes();
}

/// Computes the problem on the call's stream. `operation` is for messages.
void attend_gathered_cuda(const char* operation, const GatheredAttention& problem, const Launch& launch);

// The ways to do so: matrix products, where they fit, and multiply-adds, which take every problem. Both leave parts
// where the keys are split.
bool fits_gathered_mma(const GatheredAttention& problem);
void attend_gathered_mma(const char* operation, const GatheredAttention& problem, const Launch& launch);
void attend_gathered_fma(const char* operation, const GatheredAttention& problem, const Launch& launch);
// The sums of probabilities, once the statistics are there.
void key_probs_mma(const char* operation, const GatheredAttention& problem, const Launch& launch);
void key_probs_fma(const char* operation, const GatheredAttention& problem, const Launch& launch);

}  // namespace dsm::attention
