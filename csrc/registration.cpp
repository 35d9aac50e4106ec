// Schemas and dispatch of every operator. No arithmetic here: each operator's kernels live in its own folder.

#include <Python.h>

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "build_info.h"
#include "msda/msda.h"
#include "sps/sps.h"

// `import querymask._C` only has to load the library: the operators register themselves below.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr) {
    PyModule_AddStringConstant(created, "build_info", querymask::kBuildInfo);
  }
  return created;
}

namespace querymask {
namespace {

// Values and attention weights take autocast's type; the locations stay in float32, because half a type's digits are
// half a pixel on a wide level.
at::Tensor msda_autocast(
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

// Features and parameters take autocast's type, as in torch's own convolutions.
at::Tensor sparse_conv2d_autocast(
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

TORCH_LIBRARY(querymask, m) {
  m.def(
      "multi_scale_deformable_attention(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "multi_scale_deformable_attention_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
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
  m.impl("multi_scale_deformable_attention", msda::forward_cpu);
  m.impl("multi_scale_deformable_attention_backward", msda::backward_cpu);
  m.impl("sparse_conv2d", sps::forward_cpu);
  m.impl("sparse_conv2d_backward", sps::backward_cpu);
}

#if QUERYMASK_WITH_CUDA
TORCH_LIBRARY_IMPL(querymask, CUDA, m) {
  m.impl("multi_scale_deformable_attention", msda::forward_cuda);
  m.impl("multi_scale_deformable_attention_backward", msda::backward_cuda);
  m.impl("sparse_conv2d", sps::forward_cuda);
  m.impl("sparse_conv2d_backward", sps::backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(querymask, AutocastCPU, m) {
  m.impl("multi_scale_deformable_attention", msda_autocast);
  m.impl("sparse_conv2d", sparse_conv2d_autocast);
}

TORCH_LIBRARY_IMPL(querymask, AutocastCUDA, m) {
  m.impl("multi_scale_deformable_attention", msda_autocast);
  m.impl("sparse_conv2d", sparse_conv2d_autocast);
}

} // namespace querymask
