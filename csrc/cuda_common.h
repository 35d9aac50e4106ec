// What the CUDA kernels of all operators share. For nvcc only.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/util/BFloat16.h>
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

// Hides from the compiler how an address in global memory was computed. It would add up the parts for every element anew,
// in 64 bits; so an element's address is one addition to a register.
template <typename T>
__device__ T* opaque(T* address) {
#ifdef __CUDACC__
  size_t global = __cvta_generic_to_global(address);
  asm volatile("" : "+l"(global));
  return static_cast<T*>(__cvta_global_to_generic(global));
#else
  return address;
#endif
}

// Reads channels from global memory that no thread of the kernel writes.
template <int kVector, typename T>
__device__ Vector<T, kVector> load(const T* address) {
  using Channels = Vector<T, kVector>;
  Channels loaded;
  if constexpr (sizeof(Channels) == 16) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(address));
    memcpy(&loaded, &words, sizeof(Channels));
  } else {
    loaded = *reinterpret_cast<const Channels*>(address);
  }
  return loaded;
}

// The channels in the type of sums. Of bfloat16 two are taken out of a word at a time, with one instruction each.
template <typename T, typename C, int kVector>
__device__ void unpack(const Vector<T, kVector>& loaded, C (&channels)[kVector]) {
  if constexpr (std::is_same_v<T, at::BFloat16> && kVector % 2 == 0) {
    uint32_t words[kVector / 2];
    memcpy(words, loaded.values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      channels[i] = __uint_as_float(words[i / 2] << 16);
      channels[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      channels[i] = static_cast<C>(loaded.values[i]);
    }
  }
}

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
