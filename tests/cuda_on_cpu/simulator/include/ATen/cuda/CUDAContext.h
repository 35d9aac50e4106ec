#pragma once

#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

struct cudaDeviceProp {
  int major, minor;
  int multiProcessorCount;
  size_t sharedMemPerBlock, sharedMemPerBlockOptin;
};

namespace at::cuda {

using c10::cuda::getCurrentCUDAStream;

inline cudaDeviceProp* getCurrentDeviceProperties() {
  static cudaDeviceProp properties{
      SIMULATED_ARCH / 100, SIMULATED_ARCH / 10 % 10, 132, ::simulated::kSharedDefault, ::simulated::kSharedMost};
  return &properties;
}
inline cudaDeviceProp* getDeviceProperties(c10::DeviceIndex) {
  return getCurrentDeviceProperties();
}

} // namespace at::cuda
