// What the two ways of the sparse convolution on CUDA share. For nvcc only.

#pragma once

#include "sps.h"

namespace querymask::sps {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The products on tensor cores, of all branches in one launch. All tensors are contiguous and on the current device;
// neighbours [G, K, A] in int64 are rows of features, or -1 outside of the region.
namespace tensor_core {

// Whether the functions below take a call; grad is undefined in the forward pass. They do not take float64, float32
// where PyTorch's switch for products is not at TF32, widths of a branch that are no multiples of 8, and GPUs before
// sm_80.
bool takes(const Sizes& sizes, const at::Tensor& features, const at::Tensor& grad);

// Returns the output [A, C_out]. Bias may be undefined.
at::Tensor forward(
    const Sizes& sizes,
    const at::Tensor& features,
    const at::Tensor& neighbours,
    const at::Tensor& weight,
    const at::Tensor& bias);

// Returns the gradients in float32 of features [N, C_in], summed in no fixed order, and of weight.
std::tuple<at::Tensor, at::Tensor> backward(
    const Sizes& sizes,
    const at::Tensor& grad,
    const at::Tensor& features,
    const at::Tensor& neighbours,
    const at::Tensor& weight);

} // namespace tensor_core
} // namespace querymask::sps
