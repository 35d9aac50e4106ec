// Multi-scale deformable attention: what the kernels of every device share.
//
// Shape letters: B batch, S tokens (sum of H_l * W_l), M heads, D channels of a head, Q queries, L levels, P points.

#pragma once

#include <cstdint>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace querymask::msda {

// The sizes of one call, read from its arguments by `check`.
struct Sizes {
  int64_t B, S, M, D, Q, L, P;

  int64_t samples() const { // of one query and head
    return L * P;
  }
};

// Raises ValueError or TypeError, naming the argument and the remedy, unless the arguments fit together:
// value [B, S, M, D], spatial_shapes [h0, w0, h1, w1, ...], sampling_locations [B, Q, M, L, P, 2] in float32 or
// float64, attention_weights [B, Q, M, L, P] in value's type; all on one device.
Sizes check(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);

// The same for the gradient of the output, [B, Q, M * D].
void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes);

// Returns the output [B, Q, M * D] in value's type.
at::Tensor forward_cpu(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);
at::Tensor forward_cuda(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Returns the gradients of value, sampling_locations and attention_weights, each in its tensor's shape and type.
Gradients backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);
Gradients backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights);

} // namespace querymask::msda
