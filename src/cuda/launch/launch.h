// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "dsm/launch.h"

namespace dsm::cuda {

/// Throws what the CUDA runtime reports. Requests are checked before, so this means a broken device or no code for it.
inline void check(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(operation) + ": CUDA reports " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, std::size_t shared_bytes, const Launch& on) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(on.stream);
  return config;
}

/// Puts a kernel on the call's stream. A refused launch throws; errors inside the kernel appear at the caller's next
/// synchronisation, as nothing here waits.
template <class... Parameters, class... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            const Launch& on, Arguments&&... arguments) {
  const cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, on);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), operation);
}

/// As launch, with clusters of so many blocks, neighbours in x (sm_90).
template <class... Parameters, class... Arguments>
void launch_clusters(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                     std::size_t shared_bytes, const Launch& on, Arguments&&... arguments) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, on);
  config.attrs = &size;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), operation);
}

/// Of the current device: 80, 90, ...
inline int compute_capability(const char* operation) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), operation);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), operation);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), operation);
  return 10 * major + minor;
}

/// Whether the current device runs code for sm_90a, and this library has it.
inline bool is_hopper(const char* operation) { return DSM_WITH_SM90A && compute_capability(operation) == 90; }

/// As launch, for a kernel that may start while the one before it on the stream still runs (programmatic dependent
/// launch): it reads nothing of that one's before await_previous_kernel (src/cuda/ptx/barrier.cuh). Only where code for
/// sm_90a runs: that for older devices, which newer ones run, too, does not wait.
template <class... Parameters, class... Arguments>
void launch_dependent(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      std::size_t shared_bytes, const Launch& on, Arguments&&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, on);
  config.attrs = &early;
  config.numAttrs = is_hopper(operation);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), operation);
}

/// Multiprocessors of the current device.
inline int multiprocessors(const char* operation) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), operation);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), operation);
  return count;
}

/// Shared memory that a block of the current device can ask for, less 1 KB for what kernels declare themselves.
inline std::size_t shared_bytes_limit(const char* operation) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), operation);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), operation);
  return static_cast<std::size_t>(bytes) - 1024;
}

/// Lets a kernel use more shared memory than the 48 KB that need no asking, of which its own variables take a part.
template <class... Parameters>
void allow_shared_bytes(const char* operation, void (*kernel)(Parameters...), std::size_t shared_bytes) {
  if (shared_bytes > 47 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          operation);
}

/// Blocks of a kernel that run at the same time on the whole device: the grid of a kernel that loops over its work.
template <class... Parameters>
int resident_blocks(const char* operation, void (*kernel)(Parameters...), int threads, std::size_t shared_bytes) {
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, shared_bytes), operation);
  return per_multiprocessor * multiprocessors(operation);
}

template <class Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace dsm::cuda
