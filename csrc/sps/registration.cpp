// Schemas and dispatch of the sparse convolution.

#include "sps.h"

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "../build_info.h"

namespace querymask::sps {
namespace {

// Features and parameters take autocast's type, as in torch's own convolutions.
at::Tensor forward_autocast(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    c10::SymIntArrayRef dilation) {
  const at::DeviceType device = features.device().type();
  const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("querymask::sparse_conv2d", "")
                             .typed<at::Tensor(
                                 const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const std::optional<at::Tensor>&, c10::SymIntArrayRef)>();
  return op.call(
      at::autocast::cached_cast(type, features, device), index_map, cells,
      at::autocast::cached_cast(type, weight, device), at::autocast::cached_cast(type, bias, device), dilation);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(querymask, m) {
  m.def(
      "sparse_conv2d(Tensor features, Tensor index_map, Tensor cells, Tensor weight, Tensor? bias, "
      "SymInt[] dilation) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sparse_conv2d_backward(Tensor grad_output, Tensor features, Tensor index_map, Tensor cells, Tensor weight, "
      "SymInt[] dilation) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(querymask, CPU, m) {
  m.impl("sparse_conv2d", forward_cpu);
  m.impl("sparse_conv2d_backward", backward_cpu);
}

#if QUERYMASK_WITH_CUDA
TORCH_LIBRARY_IMPL(querymask, CUDA, m) {
  m.impl("sparse_conv2d", forward_cuda);
  m.impl("sparse_conv2d_backward", backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(querymask, AutocastCPU, m) {
  m.impl("sparse_conv2d", forward_autocast);
}

TORCH_LIBRARY_IMPL(querymask, AutocastCUDA, m) {
  m.impl("sparse_conv2d", forward_autocast);
}

} // namespace querymask::sps
