// What the CUDA kernels of all operators share. For nvcc only.

#pragma once

#include <type_traits>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>

#include "build_info.h"

namespace querymask {

// The type of sums within kernels.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Channels that a thread reads or writes at once.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

// Adds to global memory that is aligned to the size of the channels or to 16 bytes.
template <typename C, int kVector>
__device__ void add(C* address, const C (&channels)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<C, float> && kVector % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      atomicAdd(
          reinterpret_cast<float4*>(address + i),
          make_float4(channels[i], channels[i + 1], channels[i + 2], channels[i + 3]));
    }
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      atomicAdd(address + i, channels[i]);
    }
  }
}

// Raises the error of the last launch, if any.
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(
      error != cudaErrorNoKernelImageForDevice, "QueryMask's extension was built for the GPU architectures ",
      kCudaArchitectures,
      ", which this GPU is not one of: build it again with TORCH_CUDA_ARCH_LIST set to the GPU's compute capability "
      "(docs/installation.md)");
  C10_CUDA_CHECK(error);
}

} // namespace querymask
