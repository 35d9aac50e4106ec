// Multi-scale deformable attention on CUDA: which kernel serves a call.
//
// A group of threads serves one query and head; each thread owns a vector of channels (16 bytes where D allows it). The
// samples' coordinates are computed once: the threads of a group prepare one sample each, leave the four neighbours and
// weights in shared memory, and then all of them read them back, sample after sample. A block serves a tile of queries of
// one head, 8 pixels wide where the queries are the tokens themselves (encoders), so that neighbouring queries find each
// other's values in the L1 cache. The gradient of value has kernels of its own. What the loops cost:
// benchmarks/results/cuda_instructions.md.

#include "msda.h"

#include <algorithm>
#include <type_traits>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda_common.h"
#include "cuda_backward.h"
#include "cuda_deterministic.h"
#include "cuda_forward.h"
#include "cuda_joined.h"

namespace querymask::msda {
namespace {

// group: threads of a query and head.
Geometry make_geometry(const Sizes& sizes, at::IntArrayRef spatial_shapes, int group) {
  TORCH_CHECK_VALUE(
      sizes.L <= kMaxLevels, "the CUDA operator takes at most ", kMaxLevels, " levels, got ", sizes.L,
      ": use multi_scale_deformable_attention_reference");
  TORCH_CHECK_VALUE(
      sizes.S < (1 << 27) && sizes.samples() < INT32_MAX / 2 && sizes.M < INT32_MAX && sizes.D < INT32_MAX / 2,
      "a size is too large for the CUDA operator: S = ", sizes.S, ", M = ", sizes.M, ", D = ", sizes.D,
      ", L * P = ", sizes.samples());
  Geometry geometry{};
  geometry.B = sizes.B;
  geometry.S = sizes.S;
  geometry.Q = sizes.Q;
  geometry.M = static_cast<int>(sizes.M);
  geometry.D = static_cast<int>(sizes.D);
  geometry.L = static_cast<int>(sizes.L);
  geometry.P = static_cast<int>(sizes.P);
  geometry.group = group;
  const int64_t members = kThreads / geometry.group;
  geometry.tiled = sizes.Q == sizes.S;
  int64_t token = 0, tiles = 0, cells = 0;
  for (int64_t l = 0; l < sizes.L; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    geometry.height[l] = static_cast<int>(height);
    geometry.width[l] = static_cast<int>(width);
    geometry.token[l] = static_cast<int>(token);
    geometry.first_tile[l] = static_cast<unsigned>(tiles);
    geometry.first_cell[l] = static_cast<int>(cells);
    token += height * width;
    const int64_t tile_height = members / kTileWidth;
    cells += (height + 1) * (width + 1);
    tiles += (height + tile_height - 1) / tile_height * ((width + kTileWidth - 1) / kTileWidth);
  }
  geometry.first_tile[sizes.L] = static_cast<unsigned>(tiles);
  geometry.first_cell[sizes.L] = static_cast<int>(cells);
  const int64_t blocks = geometry.tiled ? tiles : (sizes.Q + members - 1) / members;
  TORCH_CHECK_VALUE(blocks < INT32_MAX, "too many queries for the CUDA operator: ", sizes.Q);
  geometry.blocks = static_cast<unsigned>(blocks);
  return geometry;
}

// Threads that own the channels of a head, a vector of them each: a power of two, at most 32.
int group_of(const Sizes& sizes, int vector) {
  int group = 1;
  while (group < 32 && group * vector < sizes.D) {
    group *= 2;
  }
  return group;
}

// What kernels are compiled for: the type that counts the elements of an image, the channels of a thread, and the threads
// of a query and head, or 0 where only the call tells.
template <typename Offset_, int kVector_, int kGroup_>
struct Shape {
  using Offset = Offset_;
  static constexpr int kVector = kVector_, kGroup = kGroup_;
};

// Calls run(shape, geometry): heads of 17 to 64 channels, as models have, get constants; other widths, float64 and images
// of 2^32 elements or more the general form, with single channels where they do not fill a vector.
template <typename T, typename Run>
void by_shape(const Sizes& sizes, at::IntArrayRef spatial_shapes, const Run& run) {
  constexpr int kWidest = 16 / sizeof(T);
  if (sizes.D % kWidest != 0) {
    run(Shape<int64_t, 1, 0>(), make_geometry(sizes, spatial_shapes, group_of(sizes, 1)));
    return;
  }
  const Geometry geometry = make_geometry(sizes, spatial_shapes, group_of(sizes, kWidest));
  if constexpr (!std::is_same_v<T, double>) {
    if (sizes.S * sizes.M * sizes.D <= UINT32_MAX) {
      if (geometry.group == 32 / kWidest) {
        run(Shape<uint32_t, kWidest, 32 / kWidest>(), geometry);
        return;
      }
      if (geometry.group == 64 / kWidest) {
        run(Shape<uint32_t, kWidest, 64 / kWidest>(), geometry);
        return;
      }
    }
  }
  run(Shape<int64_t, kWidest, 0>(), geometry);
}

dim3 grid_of(const Geometry& geometry, int64_t blocks) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(geometry.B * geometry.M, 65535)));
}

// The tensor as kernels read it: contiguous, and aligned to what a thread reads at once.
at::Tensor readable(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous : contiguous.clone();
}

// The gradient of value in the type of sums, by cuda_joined.h.
template <typename T, typename C>
at::Tensor sum_joined(
    const Sizes& sizes,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& grad_output,
    const at::Tensor& value,
    const at::Tensor& locations,
    const at::Tensor& attention) {
  constexpr int kWidest = 16 / sizeof(C);
  at::Tensor grad_value = at::zeros(value.sizes(), locations.options());
  // Tiles of tokens have most in common where they are large. Few queries are to fill many blocks.
  const Geometry geometry = make_geometry(sizes, spatial_shapes, sizes.Q == sizes.S ? kThreads / kMaxMembers : 16);
  const auto launch = [&](auto kernel) {
    kernel<<<grid_of(geometry, geometry.blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        geometry, grad_output.const_data_ptr<T>(), locations.const_data_ptr<C>(), attention.const_data_ptr<T>(),
        grad_value.mutable_data_ptr<C>());
    check_launch();
  };
  if (sizes.D % kWidest == 0) {
    launch(joined_kernel<T, C, kWidest>);
  } else {
    launch(joined_kernel<T, C, 1>);
  }
  return grad_value;
}

// The gradient of value in its type, by cuda_deterministic.h. Takes about 30 bytes for each sample besides.
template <typename T, typename C, int kVector>
at::Tensor sum_in_order(
    const Geometry& geometry,
    const at::Tensor& grad_output,
    const at::Tensor& value,
    const at::Tensor& locations,
    const at::Tensor& attention) {
  const int64_t samples = attention.numel(), cells = geometry.B * geometry.M * geometry.first_cell[geometry.L];
  TORCH_CHECK_VALUE(
      samples < INT32_MAX && cells < INT32_MAX && grad_output.numel() / kVector <= UINT32_MAX,
      "the deterministic gradient of multi_scale_deformable_attention takes less than 2^31 samples and tokens, counted "
      "for each head, and less than 2^32 vectors of ",
      kVector, " outputs, got ", samples, ", ", cells, " and ", grad_output.numel() / kVector, ": use smaller batches");
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::TensorOptions integers = value.options().dtype(at::kInt);
  const at::Tensor cell_of_sample = at::empty({samples}, integers);
  cell_kernel<C><<<static_cast<unsigned>((samples + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      geometry, locations.const_data_ptr<C>(), cell_of_sample.mutable_data_ptr<int>());
  check_launch();
  const auto [sorted, order] = at::sort(cell_of_sample, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor begins = at::searchsorted(sorted, at::arange(cells + 1, integers), /*out_int32=*/true);
  at::Tensor grad_value = at::empty(value.sizes(), value.options());
  const int64_t tokens = kThreads / 32; // of a block
  gather_kernel<T, C, kVector><<<grid_of(geometry, (geometry.S + tokens - 1) / tokens), kThreads, 0, stream>>>(
      geometry, grad_output.const_data_ptr<T>(), locations.const_data_ptr<C>(), attention.const_data_ptr<T>(),
      order.template const_data_ptr<int64_t>(), begins.const_data_ptr<int>(), grad_value.mutable_data_ptr<T>());
  check_launch();
  return grad_value;
}

} // namespace

at::Tensor forward_cuda(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check(value, spatial_shapes, sampling_locations, attention_weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor v = readable(value);
  const at::Tensor locations = readable(sampling_locations.to(compute_type(value)));
  const at::Tensor attention = attention_weights.contiguous();
  at::Tensor output = at::empty({sizes.B, sizes.Q, sizes.M * sizes.D}, v.options());
  if (output.numel() == 0) {
    return output;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "multi_scale_deformable_attention", [&] {
    using C = Compute<scalar_t>;
    by_shape<scalar_t>(sizes, spatial_shapes, [&](auto shape, const Geometry& geometry) {
      using S = decltype(shape);
      forward_kernel<scalar_t, C, typename S::Offset, S::kVector, S::kGroup>
          <<<grid_of(geometry, geometry.blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              geometry, v.const_data_ptr<scalar_t>(), locations.const_data_ptr<C>(),
              attention.const_data_ptr<scalar_t>(), output.mutable_data_ptr<scalar_t>());
      check_launch();
    });
  });
  return output;
}

Gradients backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::ScalarType type = compute_type(value);
  const at::Tensor grad = readable(grad_output);
  const at::Tensor v = readable(value);
  const at::Tensor locations = readable(sampling_locations.to(type));
  const at::Tensor attention = attention_weights.contiguous();
  const bool some = grad.numel() > 0 && attention.numel() > 0;
  const bool in_order = at::globalContext().deterministicAlgorithms(); // atomic additions come in any order
  at::Tensor grad_value = some ? at::Tensor() : at::zeros(v.sizes(), v.options());
  at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_attention = at::empty(attention.sizes(), attention.options().dtype(type));
  if (some) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, v.scalar_type(), "multi_scale_deformable_attention_backward", [&] {
          using C = Compute<scalar_t>;
          by_shape<scalar_t>(sizes, spatial_shapes, [&](auto shape, const Geometry& geometry) {
            using S = decltype(shape);
            backward_kernel<scalar_t, C, typename S::Offset, S::kVector, S::kGroup>
                <<<grid_of(geometry, geometry.blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                    geometry, grad.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(),
                    locations.const_data_ptr<C>(), attention.const_data_ptr<scalar_t>(),
                    grad_locations.mutable_data_ptr<C>(), grad_attention.mutable_data_ptr<C>());
            check_launch();
            grad_value = in_order
                ? sum_in_order<scalar_t, C, S::kVector>(geometry, grad, v, locations, attention)
                : sum_joined<scalar_t, C>(sizes, spatial_shapes, grad, v, locations, attention);
          });
        });
  } else {
    grad_locations.zero_();
    grad_attention.zero_();
  }
  return {
      grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
      grad_attention.to(attention_weights.scalar_type())};
}

} // namespace querymask::msda
