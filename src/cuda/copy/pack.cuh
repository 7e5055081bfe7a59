// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <initializer_list>

#include "dsm/tensor_view.h"
#include "src/cuda/copy/element.cuh"

namespace dsm::cuda {

/// The widest access of one thread.
inline constexpr int kPackBytes = 16;

template <class T>
inline constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(T));

/// N neighbouring elements, moved by one instruction: kPackSize<T> of them when addresses allow it, otherwise one.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  if constexpr (N * sizeof(T) == kPackBytes)
    return __builtin_bit_cast(Pack<T, N>, *reinterpret_cast<const uint4*>(from));
  else if constexpr (N * sizeof(T) == 8)
    return __builtin_bit_cast(Pack<T, N>, *reinterpret_cast<const uint2*>(from));
  else
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (N * sizeof(T) == kPackBytes)
    *reinterpret_cast<uint4*>(to) = __builtin_bit_cast(uint4, pack);
  else
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

/// Forbids the compiler to begin work on a loaded pack before this point: it would wait for the load there.
template <class T, int N>
__device__ __forceinline__ void use_from_here(Pack<T, N>& pack) {
  if constexpr (N * sizeof(T) == kPackBytes) {
    uint4 words = __builtin_bit_cast(uint4, pack);
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    pack = __builtin_bit_cast(Pack<T, N>, words);
  } else if constexpr (N * sizeof(T) == 8) {
    uint2 words = __builtin_bit_cast(uint2, pack);
    asm volatile("" : "+r"(words.x), "+r"(words.y));
    pack = __builtin_bit_cast(Pack<T, N>, words);
  } else if constexpr (N * sizeof(T) == 4) {
    auto word = __builtin_bit_cast(unsigned, pack);
    asm volatile("" : "+r"(word));
    pack = __builtin_bit_cast(Pack<T, N>, word);
  }
}

/// N elements widened, by as many accesses as they need.
template <int N, class T>
__device__ __forceinline__ void load_widened(const T* from, Compute<T> (&to)[N]) {
  constexpr int kPart = N < kPackSize<T> ? N : kPackSize<T>;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    const Pack<T, kPart> pack = load_pack<kPart>(from + part);
#pragma unroll
    for (int i = 0; i < kPart; ++i) to[part + i] = widened(pack.at[i]);
  }
}

/// N wide values rounded and stored as one pack.
template <class T, int N>
__device__ __forceinline__ void store_narrowed(T* to, const Compute<T> (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = narrowed<T>(from[i]);
  store_pack(to, pack);
}

/// Whether packs may be used on every row of the tensors: first element and all strides but the last, which is 1, are
/// multiples of 16 bytes. Absent tensors pass.
inline bool packable(std::initializer_list<TensorView> tensors) {
  for (const TensorView& tensor : tensors) {
    if (!tensor) continue;
    const std::int64_t elements = kPackBytes / element_size(tensor.dtype);
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % kPackBytes != 0) return false;
    for (int i = 0; i + 1 < tensor.rank; ++i)
      if (tensor.shape[i] > 1 && tensor.stride[i] % elements != 0) return false;
  }
  return true;
}

}  // namespace dsm::cuda
