// The GPU's BLAS, by the CPU's.

#pragma once

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace at::cuda {

using at::cpu::addmm;
using at::cpu::addmm_out;
using at::cpu::mm;
using at::cpu::mm_out;

} // namespace at::cuda
