#pragma once

#include "scheduler.h"

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t pointer;
  operator cudaStream_t() const {
    return pointer;
  }
  cudaStream_t stream() const {
    return pointer;
  }
};
inline CUDAStream getCurrentCUDAStream() {
  return {::simulated::current_stream()};
}

} // namespace c10::cuda
