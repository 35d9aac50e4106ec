// Convolution on structure-preserving sparsity (SPS): what the kernels of every device share.
//
// Shape letters: N rows of features, R regions of H x W cells, A active cells, K taps of a kernel (kH * kW), C_in and
// C_out channels, G branches: equal groups of the C_out outputs, one after the other, with a dilation each.

#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace querymask::sps {

// The sizes of one call, read from its arguments by `check`.
struct Sizes {
  int64_t N, R, H, W, A, C_in, C_out, kH, kW;
  at::IntArrayRef dilation; // (vertical, horizontal) of each branch, in the caller's memory

  int64_t branches() const {
    return static_cast<int64_t>(dilation.size()) / 2;
  }
  int64_t branch_outputs() const {
    return C_out / branches();
  }
  int64_t taps() const {
    return kH * kW;
  }
  int64_t columns() const { // of a branch's gathered matrix
    return kH * kW * C_in;
  }
};

// Raises ValueError or TypeError, naming the argument and the remedy, unless the arguments fit together:
// features [N, C_in], index_map [R, H, W] and cells [A, 3] in int32 or int64, weight [C_out, C_in, kH, kW] with odd kH
// and kW, bias [C_out] or none, dilation (vertical, horizontal) for each of one or more branches, whose number divides
// C_out; all on one device, weight and bias in features' type.
Sizes check(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef dilation);

// The same for the gradient of the output, [A, C_out].
void check_grad_output(const at::Tensor& grad_output, const at::Tensor& features, const Sizes& sizes);

// Returns the output [A, C_out] in features' type.
at::Tensor forward_cpu(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef dilation);
at::Tensor forward_cuda(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef dilation);

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Returns the gradients of features [N, C_in], weight [C_out, C_in, kH, kW] and bias [C_out] in features' type.
Gradients backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    at::IntArrayRef dilation);
Gradients backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    at::IntArrayRef dilation);

} // namespace querymask::sps
