// Argument checks of the sparse convolution. The same texts are in querymask/common/ops/sps/reference.py.

#include "sps.h"

#include <algorithm>

#include <c10/util/Exception.h>

namespace querymask::sps {
namespace {

bool is_floating_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble;
}

bool is_index_type(at::ScalarType type) {
  return type == at::kInt || type == at::kLong;
}

} // namespace

Sizes check(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(features.dim() == 2, "features must be [N, C_in], got shape ", features.sizes());
  TORCH_CHECK_VALUE(index_map.dim() == 3, "index_map must be [R, H, W], got shape ", index_map.sizes());
  TORCH_CHECK_VALUE(
      cells.dim() == 2 && cells.size(1) == 3, "cells must be [N_A, 3] (region, y, x), got shape ", cells.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 4, "weight must be [C_out, C_in, kH, kW], got shape ", weight.sizes());
  TORCH_CHECK_VALUE(
      weight.size(1) == features.size(1), "weight [C_out, C_in, kH, kW] has shape ", weight.sizes(),
      " but features have C_in = ", features.size(1));
  TORCH_CHECK_VALUE(
      weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1, "weight has a kernel of ", weight.size(2), " x ",
      weight.size(3), ": both must be odd, so that it has a centre");
  TORCH_CHECK_VALUE(
      !bias || bias->sizes() == at::IntArrayRef({weight.size(0)}), "bias must be [C_out] = [", weight.size(0),
      "] or None, got shape ", bias ? bias->sizes() : at::IntArrayRef());
  TORCH_CHECK_VALUE(
      !dilation.empty() && dilation.size() % 2 == 0 &&
          std::all_of(dilation.begin(), dilation.end(), [](int64_t step) { return step > 0 && step < INT32_MAX; }),
      "dilation must be two positive numbers (vertical, horizontal) for each branch, got ", dilation);
  const int64_t branches = static_cast<int64_t>(dilation.size()) / 2;
  TORCH_CHECK_VALUE(
      weight.size(0) % branches == 0, "the ", branches, " branches of dilation ", dilation,
      " must have equal shares of weight's C_out = ", weight.size(0));

  TORCH_CHECK_VALUE(
      index_map.device() == features.device() && cells.device() == features.device() &&
          weight.device() == features.device() && (!bias || bias->device() == features.device()),
      "all tensors must be on one device, got features on ", features.device(), ", index_map on ", index_map.device(),
      ", cells on ", cells.device(), ", weight on ", weight.device(), ", bias on ",
      bias ? bias->device() : features.device());
  TORCH_CHECK_TYPE(
      is_floating_type(features.scalar_type()), "features must be float16, bfloat16, float32 or float64, got ",
      features.scalar_type());
  TORCH_CHECK_TYPE(
      is_index_type(index_map.scalar_type()), "index_map must be int32 or int64, got ", index_map.scalar_type());
  TORCH_CHECK_TYPE(is_index_type(cells.scalar_type()), "cells must be int32 or int64, got ", cells.scalar_type());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == features.scalar_type() && (!bias || bias->scalar_type() == features.scalar_type()),
      "weight and bias must have features' type ", features.scalar_type(), ", got ", weight.scalar_type(), " and ",
      bias ? bias->scalar_type() : features.scalar_type(), ": convert them with .to()");
  return {features.size(0), index_map.size(0), index_map.size(1), index_map.size(2), cells.size(0), features.size(1),
          weight.size(0),   weight.size(2),    weight.size(3),    dilation};
}

void check_grad_output(const at::Tensor& grad_output, const at::Tensor& features, const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      grad_output.dim() == 2 && grad_output.size(0) == sizes.A && grad_output.size(1) == sizes.C_out,
      "grad_output must be [N_A, C_out] = [", sizes.A, ", ", sizes.C_out, "], got shape ", grad_output.sizes());
  TORCH_CHECK_VALUE(
      grad_output.device() == features.device(), "grad_output must be on features' device ", features.device(),
      ", got ", grad_output.device());
  TORCH_CHECK_TYPE(
      grad_output.scalar_type() == features.scalar_type(), "grad_output must have features' type ",
      features.scalar_type(), ", got ", grad_output.scalar_type());
}

} // namespace querymask::sps
