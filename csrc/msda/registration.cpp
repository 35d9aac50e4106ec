// Schemas and dispatch of multi-scale deformable attention.

#include "msda.h"

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../build_info.h"

namespace querymask::msda {
namespace {

// Values and attention weights take autocast's type; the locations stay in float32, because half a type's digits are
// half a pixel on a wide level.
at::Tensor forward_autocast(
    const at::Tensor& value,
    c10::SymIntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const at::DeviceType device = value.device().type();
  const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("querymask::multi_scale_deformable_attention", "")
          .typed<at::Tensor(const at::Tensor&, c10::SymIntArrayRef, const at::Tensor&, const at::Tensor&)>();
  return op.call(
      at::autocast::cached_cast(type, value, device), spatial_shapes,
      at::autocast::cached_cast(at::kFloat, sampling_locations, device),
      at::autocast::cached_cast(type, attention_weights, device));
}

} // namespace

TORCH_LIBRARY_FRAGMENT(querymask, m) {
  m.def(
      "multi_scale_deformable_attention(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_scale_deformable_attention_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(querymask, CPU, m) {
  m.impl("multi_scale_deformable_attention", forward_cpu);
  m.impl("multi_scale_deformable_attention_backward", backward_cpu);
}

#if QUERYMASK_WITH_CUDA
TORCH_LIBRARY_IMPL(querymask, CUDA, m) {
  m.impl("multi_scale_deformable_attention", forward_cuda);
  m.impl("multi_scale_deformable_attention_backward", backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(querymask, AutocastCPU, m) {
  m.impl("multi_scale_deformable_attention", forward_autocast);
}

TORCH_LIBRARY_IMPL(querymask, AutocastCUDA, m) {
  m.impl("multi_scale_deformable_attention", forward_autocast);
}

} // namespace querymask::msda
