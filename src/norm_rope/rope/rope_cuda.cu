// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory. The work is one list of items, token after token and head after head: first those that copy one pack
// of the untouched part, then those that rotate as many pairs as a pack has elements, which are two packs. A block
// takes the same number of items whatever the shape. It first computes the rotations it needs into a table in shared
// memory: those of its tokens, used by all heads, or, where a head has too many, those of its items.
#include <limits>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/norm_rope/rope/rope.h"
#include "src/numerics/rope.h"

namespace dsm {
namespace {

using cuda::Pack;

constexpr int kThreads = 256;
constexpr int kItemsPerThread = 2;  // loaded before the first is used
constexpr int kItemsPerBlock = kThreads * kItemsPerThread;
// The table may be this much larger than one entry per pair of the block's items, if that saves computing a rotation
// for every head; either way it stays below the 48 KB that every device gives.
constexpr std::int64_t kSpareEntries = 1024;

/// [tokens, heads, d] with the last dimension contiguous.
template <class T>
struct Heads {
  T* data;
  std::int64_t token_stride, head_stride;

  explicit Heads(const TensorView& view)
      : data(view.as<T>()), token_stride(view.stride[0]), head_stride(view.stride[1]) {}
  __device__ T* at(std::int64_t token, std::int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

/// The items, counted from the first of a token.
struct Items {
  std::uint32_t copies, per_head, per_token;  ///< copies come first in a head; 0 when working in place
  std::int64_t total;

  Items(const RopeArgs& a, int pack, bool in_place) {
    const std::int64_t pairs = a.inv_freq.size(0), copied = a.x.size(2) - 2 * pairs;
    copies = in_place ? 0 : static_cast<std::uint32_t>(copied / pack);
    per_head = copies + static_cast<std::uint32_t>(pairs / pack);
    per_token = per_head * static_cast<std::uint32_t>(a.x.size(1));
    total = a.x.size(0) * per_token;
  }
};

/// The rotation of pair `pair` at a token.
template <class A>
struct Rotations {
  const std::int64_t* positions;
  const float* inv_freq;
  bool inverted;

  __device__ Rotation<A> operator()(std::int64_t token, int pair) const {
    const Rotation<A> forward = rope_rotation<A>(rope_angle(positions[token], inv_freq[pair]));
    return inverted ? inverse(forward) : forward;
  }
};

template <class T, int W, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    rope_cuda_kernel(Heads<const T> x, Heads<T> y, Rotations<Compute<T>> rotations, Items items, int copied, int pairs,
                     bool table_of_tokens) {
  using A = Compute<T>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto* table = reinterpret_cast<Rotation<A>*>(shared_bytes);

  const std::int64_t begin = std::int64_t{blockIdx.x} * kItemsPerBlock;
  const std::int64_t first_token = begin / items.per_token;
  const auto skipped = static_cast<std::uint32_t>(begin - first_token * items.per_token);
  const auto count = static_cast<std::uint32_t>(min(std::int64_t{kItemsPerBlock}, items.total - begin));

  struct Item {
    T* to;
    std::uint32_t rotation;  // of its first pair in the table
    bool rotates;
    Pack<T, W> a, b;
  } held[kItemsPerThread];
  // The second pack of a rotation: behind the first when pairs are neighbours, in the other half otherwise.
  const int partner = kInterleaved ? W : pairs;
#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    const std::uint32_t index = i * kThreads + threadIdx.x;
    if (index >= count) continue;
    Item& item = held[i];
    const std::uint32_t token = (skipped + index) / items.per_token;
    const std::uint32_t in_token = skipped + index - token * items.per_token;
    const std::uint32_t head = in_token / items.per_head, in_head = in_token - head * items.per_head;
    item.rotates = in_head >= items.copies;
    const int pair = (in_head - items.copies) * W;
    const int offset = !item.rotates ? in_head * W : copied + pair * (kInterleaved ? 2 : 1);
    const T* from = x.at(first_token + token, head) + offset;
    item.to = y.at(first_token + token, head) + offset;
    item.a = cuda::load_pack<W>(from);
    if (!item.rotates) continue;
    item.b = cuda::load_pack<W>(from + partner);
    item.rotation = table_of_tokens ? token * pairs + pair : index * W;
    if (table_of_tokens) continue;
#pragma unroll 1
    for (int j = 0; j < W; ++j) table[item.rotation + j] = rotations(first_token + token, pair + j);
  }
  if (table_of_tokens) {
    const std::uint32_t tokens = (skipped + count - 1) / items.per_token + 1;
    for (std::uint32_t i = threadIdx.x; i < tokens * pairs; i += kThreads) {
      const std::uint32_t token = i / pairs;
      table[i] = rotations(first_token + token, i - token * pairs);
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    if (i * kThreads + threadIdx.x >= count) continue;
    const Item& item = held[i];
    if (!item.rotates) {
      cuda::store_pack(item.to, item.a);
      continue;
    }
    A v[2 * W];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      v[j] = cuda::widened(item.a.at[j]);
      v[W + j] = cuda::widened(item.b.at[j]);
    }
#pragma unroll
    for (int j = 0; j < W; ++j)
      rotate(table[item.rotation + j], v[kInterleaved ? 2 * j : j], v[kInterleaved ? 2 * j + 1 : W + j]);
    A low[W], high[W];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      low[j] = v[j];
      high[j] = v[W + j];
    }
    cuda::store_narrowed(item.to, low);
    cuda::store_narrowed(item.to + partner, high);
  }
}

template <class T, int W, bool kInterleaved>
void launch_rope(const RopeArgs& a, const Launch& launch) {
  using A = Compute<T>;
  const bool in_place = a.x.data == a.y.data && a.x.stride == a.y.stride;
  const Items items(a, W, in_place);
  if (items.total == 0) return;
  const int pairs = static_cast<int>(a.inv_freq.size(0)), copied = static_cast<int>(a.x.size(2)) - 2 * pairs;
  // A block's items can begin and end inside a token.
  const std::int64_t tokens_entries = std::int64_t{kItemsPerBlock / items.per_token + 2} * pairs;
  const std::int64_t items_entries = std::int64_t{kItemsPerBlock} * W;
  const bool table_of_tokens = tokens_entries <= items_entries + kSpareEntries;
  cuda::launch("rope", rope_cuda_kernel<T, W, kInterleaved>,
               dim3(cuda::ceil_div<std::int64_t>(items.total, kItemsPerBlock)), dim3(kThreads),
               sizeof(Rotation<A>) * (table_of_tokens ? tokens_entries : items_entries), launch, Heads<const T>(a.x),
               Heads<T>(a.y),
               Rotations<A>{a.positions.as<const std::int64_t>(), a.inv_freq.as<const float>(), a.inverse}, items,
               copied, pairs, table_of_tokens);
}

template <class T, int W>
void launch_rope(const RopeArgs& a, const Launch& launch) {
  a.interleaved ? launch_rope<T, W, true>(a, launch) : launch_rope<T, W, false>(a, launch);
}

}  // namespace

void rope_cuda(const RopeArgs& args, const Launch& launch) {
  cpu::visit_floating(args.x.dtype, [&]<class T>() {
    constexpr int kPack = cuda::kPackSize<T>;
    const std::int64_t pairs = args.inv_freq.size(0), copied = args.x.size(2) - 2 * pairs;
    const bool packs = cuda::packable({args.x, args.y}) && copied % kPack == 0 && pairs % kPack == 0;
    packs ? launch_rope<T, kPack>(args, launch) : launch_rope<T, 1>(args, launch);
  });
}

}  // namespace dsm
