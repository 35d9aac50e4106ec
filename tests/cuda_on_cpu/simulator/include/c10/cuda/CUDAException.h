#pragma once

#include <c10/util/Exception.h>

#include "scheduler.h"

#define C10_CUDA_CHECK(expression)                                                        \
  do {                                                                                    \
    const cudaError_t simulated_error = (expression);                                     \
    TORCH_CHECK(simulated_error == cudaSuccess, "CUDA error: ", ::simulated::error_text()); \
  } while (false)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(::simulated::take_last_error())
