#pragma once

#include <c10/core/Device.h>

#include "scheduler.h"

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device) {
    ::simulated::enter_device_guard();
  }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;
  ~CUDAGuard() {
    ::simulated::leave_device_guard();
  }
};

} // namespace c10::cuda
