// Argument checks of multi-scale deformable attention. The same texts are in querymask/common/ops/msda/reference.py.

#include "msda.h"

#include <c10/util/Exception.h>

namespace querymask::msda {
namespace {

bool is_floating_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble;
}

} // namespace

Sizes check(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  TORCH_CHECK_VALUE(value.dim() == 4, "value must be [B, S, M, D], got shape ", value.sizes());
  TORCH_CHECK_VALUE(
      sampling_locations.dim() == 6 && sampling_locations.size(5) == 2,
      "sampling_locations must be [B, Q, M, L, P, 2], got shape ", sampling_locations.sizes());
  TORCH_CHECK_VALUE(
      spatial_shapes.size() % 2 == 0 && !spatial_shapes.empty(),
      "spatial_shapes must hold a height and a width for each of one or more levels, got ", spatial_shapes);
  const Sizes sizes{
      value.size(0),
      value.size(1),
      value.size(2),
      value.size(3),
      sampling_locations.size(1),
      static_cast<int64_t>(spatial_shapes.size() / 2),
      sampling_locations.size(4)};

  int64_t tokens = 0;
  for (int64_t level = 0; level < sizes.L; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    TORCH_CHECK_VALUE(
        height > 0 && width > 0, "level ", level, " of spatial_shapes is ", height, " x ", width,
        ": both must be positive");
    // Kernels count the rows and columns of a level in 32 bits, a border around it included.
    TORCH_CHECK_VALUE(
        height < INT32_MAX / 4 && width < INT32_MAX / 4 && (height + 2) * (width + 2) < INT32_MAX / 4, "level ", level,
        " of spatial_shapes is ", height, " x ", width, ": too large");
    tokens += height * width;
  }
  TORCH_CHECK_VALUE(
      tokens == sizes.S, "value has ", sizes.S, " tokens but spatial_shapes ", spatial_shapes, " add up to ", tokens,
      ": give the shapes of the levels that were concatenated into value");
  TORCH_CHECK_VALUE(
      sampling_locations.size(0) == sizes.B && sampling_locations.size(2) == sizes.M &&
          sampling_locations.size(3) == sizes.L,
      "sampling_locations [B, Q, M, L, P, 2] has shape ", sampling_locations.sizes(), " but value has B = ", sizes.B,
      " and M = ", sizes.M, ", and spatial_shapes have L = ", sizes.L);
  TORCH_CHECK_VALUE(
      attention_weights.sizes() == sampling_locations.sizes().slice(0, 5),
      "attention_weights must have the shape of sampling_locations without its last dimension, ",
      sampling_locations.sizes().slice(0, 5), ", got ", attention_weights.sizes());

  TORCH_CHECK_VALUE(
      sampling_locations.device() == value.device() && attention_weights.device() == value.device(),
      "all tensors must be on one device, got value on ", value.device(), ", sampling_locations on ",
      sampling_locations.device(), ", attention_weights on ", attention_weights.device());
  TORCH_CHECK_TYPE(
      is_floating_type(value.scalar_type()), "value must be float16, bfloat16, float32 or float64, got ",
      value.scalar_type());
  TORCH_CHECK_TYPE(
      sampling_locations.scalar_type() == at::kFloat || sampling_locations.scalar_type() == at::kDouble,
      "sampling_locations must be float32 or float64, got ", sampling_locations.scalar_type(),
      ": fewer digits displace the samples by a good part of a pixel; compute the locations in float32");
  TORCH_CHECK_TYPE(
      attention_weights.scalar_type() == value.scalar_type(), "attention_weights must have value's type ",
      value.scalar_type(), ", got ", attention_weights.scalar_type(), ": convert one of them with .to()");
  return sizes;
}

void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      grad_output.dim() == 3 && grad_output.size(0) == sizes.B && grad_output.size(1) == sizes.Q &&
          grad_output.size(2) == sizes.M * sizes.D,
      "grad_output must be [B, Q, M * D] = [", sizes.B, ", ", sizes.Q, ", ", sizes.M * sizes.D, "], got shape ",
      grad_output.sizes());
  TORCH_CHECK_VALUE(
      grad_output.device() == value.device(), "grad_output must be on value's device ", value.device(), ", got ",
      grad_output.device());
  TORCH_CHECK_TYPE(
      grad_output.scalar_type() == value.scalar_type(), "grad_output must have value's type ", value.scalar_type(),
      ", got ", grad_output.scalar_type());
}

} // namespace querymask::msda
