// Convolution on structure-preserving sparsity, on CUDA.
//
// Two ways. Products on tensor cores that gather for themselves are in cuda_tensor_core.cu. What they do not take is
// done here: chunks of cells, of which one kernel looks up the neighbours and gathers their rows, the GPU's BLAS
// multiplies, and in the backward pass another kernel adds the gradients to the neighbours' rows. So the matrix of all
// neighbours, K times the features, never exists, and the neighbours' numbers stay in registers. A thread serves one
// vector of channels (16 bytes where C_in allows it) of one cell and tap.

#include "sps.h"

#include <algorithm>

#include <ATen/CUDAFunctions.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>

#include "../cuda_common.h"
#include "cuda.h"

namespace querymask::sps {
namespace {

constexpr int kThreads = 256; // of a block
constexpr int64_t kMaxBranches = 16; // whose dilations are parameters of the kernels
constexpr int64_t kMinChunk = 256, kMaxChunk = 65536; // cells
constexpr int64_t kChunkElements = 1 << 24; // of a gathered chunk, about

// The sizes of a call as kernels take them to look up neighbours.
struct Neighbourhood {
  int64_t N, R, H, W;
  int kH, kW;
  int dilation[2 * kMaxBranches]; // (vertical, horizontal) of each branch
};

// The row of features that a branch's tap of a cell reads, or -1 outside of the region.
template <typename I>
__device__ int64_t find_row(
    const Neighbourhood& sizes,
    const I* __restrict__ map,
    const I* __restrict__ cells,
    int64_t number,
    int branch,
    int tap) {
  const I* cell = cells + 3 * number;
  const int64_t region = cell[0], cell_y = cell[1], cell_x = cell[2];
  CUDA_KERNEL_ASSERT(
      region >= 0 && region < sizes.R && cell_y >= 0 && cell_y < sizes.H && cell_x >= 0 && cell_x < sizes.W &&
      "sparse_conv2d: a cell (region, y, x) is outside of index_map");
  const int64_t y = cell_y + (tap / sizes.kW - sizes.kH / 2) * static_cast<int64_t>(sizes.dilation[2 * branch]);
  const int64_t x = cell_x + (tap % sizes.kW - sizes.kW / 2) * static_cast<int64_t>(sizes.dilation[2 * branch + 1]);
  if (y < 0 || y >= sizes.H || x < 0 || x >= sizes.W) {
    return -1;
  }
  const int64_t row = map[(region * sizes.H + y) * sizes.W + x];
  CUDA_KERNEL_ASSERT(row >= 0 && row < sizes.N && "sparse_conv2d: index_map has a number that is no row");
  return row;
}

// neighbours [G, K, A]. The grid's y runs over taps, z over branches.
template <typename I>
__global__ void __launch_bounds__(kThreads) look_up_kernel(
    const __grid_constant__ Neighbourhood sizes,
    int64_t A,
    const I* __restrict__ map,
    const I* __restrict__ cells,
    int64_t* __restrict__ neighbours) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (cell < A) {
    neighbours[(static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * A + cell] =
        find_row(sizes, map, cells, cell, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y));
  }
}

// One chunk of cells, of one branch.
struct Geometry {
  Neighbourhood sizes;
  int branch;
  int64_t first; // cell of the chunk
  int C_in, taps;
  int vectors; // of one row's channels
  unsigned items; // of the chunk: cells * taps * vectors

  unsigned blocks() const {
    return (items + kThreads - 1) / kThreads;
  }
};

// One thread's part of the gathered chunk.
struct Item {
  int64_t row; // of features, or -1 outside of the region
  int64_t place; // of its first channel in the chunk
  int channel;
};

template <typename I>
__device__ Item find_item(
    const Geometry& geometry,
    const I* __restrict__ map,
    const I* __restrict__ cells,
    unsigned index,
    int vector) {
  const unsigned pair = index / geometry.vectors; // of cell and tap
  const int channel = static_cast<int>(index % geometry.vectors) * vector;
  const int tap = static_cast<int>(pair % geometry.taps);
  const int64_t row = find_row(geometry.sizes, map, cells, geometry.first + pair / geometry.taps, geometry.branch, tap);
  return {row, static_cast<int64_t>(pair) * geometry.C_in + channel, channel};
}

template <typename T, typename I, int kVector>
__global__ void __launch_bounds__(kThreads) gather_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ features,
    const I* __restrict__ map,
    const I* __restrict__ cells,
    T* __restrict__ gathered) {
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= geometry.items) {
    return;
  }
  const Item item = find_item(geometry, map, cells, index, kVector);
  Vector<T, kVector> channels{};
  if (item.row >= 0) {
    channels = *reinterpret_cast<const Vector<T, kVector>*>(features + item.row * geometry.C_in + item.channel);
  }
  *reinterpret_cast<Vector<T, kVector>*>(gathered + item.place) = channels;
}

// grad_features is in C, so that float16 and bfloat16 are summed in float32.
template <typename T, typename I, int kVector>
__global__ void __launch_bounds__(kThreads) scatter_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ gathered,
    const I* __restrict__ map,
    const I* __restrict__ cells,
    Compute<T>* __restrict__ grad_features) {
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= geometry.items) {
    return;
  }
  const Item item = find_item(geometry, map, cells, index, kVector);
  if (item.row < 0) {
    return;
  }
  const Vector<T, kVector> loaded = *reinterpret_cast<const Vector<T, kVector>*>(gathered + item.place);
  Compute<T> channels[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    channels[i] = static_cast<Compute<T>>(loaded.values[i]);
  }
  add<Compute<T>, kVector>(grad_features + item.row * geometry.C_in + item.channel, channels);
}

int64_t chunk_of(const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      sizes.columns() < INT32_MAX / kMinChunk,
      "weight has too many inputs for the CUDA operator: kH * kW * C_in = ", sizes.columns());
  return std::clamp(kChunkElements / std::max<int64_t>(sizes.columns(), 1) / 256 * 256, kMinChunk, kMaxChunk);
}

Neighbourhood make_neighbourhood(const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      sizes.branches() <= kMaxBranches, "the CUDA operator takes at most ", kMaxBranches, " branches, got ",
      sizes.branches(), ": call it for some of them at a time");
  Neighbourhood neighbourhood{
      sizes.N, sizes.R, sizes.H, sizes.W, static_cast<int>(sizes.kH), static_cast<int>(sizes.kW), {}};
  std::copy(sizes.dilation.begin(), sizes.dilation.end(), neighbourhood.dilation);
  return neighbourhood;
}

Geometry make_geometry(const Sizes& sizes, int64_t branch, int64_t first, int64_t count, int vector) {
  const int vectors = static_cast<int>(sizes.C_in) / vector;
  return {make_neighbourhood(sizes),
          static_cast<int>(branch),
          first,
          static_cast<int>(sizes.C_in),
          static_cast<int>(sizes.taps()),
          vectors,
          static_cast<unsigned>(count * sizes.taps() * vectors)};
}

// The neighbours' rows of features [G, K, A], -1 outside of the region.
at::Tensor look_up(const Sizes& sizes, const at::Tensor& index_map, const at::Tensor& cells) {
  at::Tensor neighbours =
      at::empty({sizes.branches(), sizes.taps(), sizes.A}, index_map.options().dtype(at::kLong));
  const dim3 blocks(
      static_cast<unsigned>(ceil_div(sizes.A, kThreads)), static_cast<unsigned>(sizes.taps()),
      static_cast<unsigned>(sizes.branches()));
  AT_DISPATCH_INDEX_TYPES(index_map.scalar_type(), "sparse_conv2d", [&] {
    look_up_kernel<index_t><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        make_neighbourhood(sizes), sizes.A, index_map.const_data_ptr<index_t>(), cells.const_data_ptr<index_t>(),
        neighbours.mutable_data_ptr<int64_t>());
    check_launch();
  });
  return neighbours;
}

// Calls run(vector) with the widest vector of channels that C_in and the pointers' alignment allow, a constant.
template <typename T, typename Run>
void by_vector(const Sizes& sizes, uintptr_t pointers, const Run& run) {
  constexpr int kWidest = 16 / sizeof(T);
  if (sizes.C_in % kWidest == 0 && pointers % 16 == 0) {
    run(std::integral_constant<int, kWidest>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

// Calls run(type, index) with values of the types of features and of indices.
template <typename Run>
void by_type(at::ScalarType type, at::ScalarType indices, const Run& run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "sparse_conv2d", [&] {
    AT_DISPATCH_INDEX_TYPES(indices, "sparse_conv2d", [&] { run(scalar_t{}, index_t{}); });
  });
}

// Fills gathered [count, K * C_in] with a branch's neighbours of cells [first, first + count).
void gather(
    const Sizes& sizes,
    int64_t branch,
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    int64_t first,
    int64_t count,
    at::Tensor& gathered) {
  by_type(features.scalar_type(), index_map.scalar_type(), [&](auto type, auto index) {
    using T = decltype(type);
    using I = decltype(index);
    const T* data = features.const_data_ptr<T>();
    by_vector<T>(sizes, reinterpret_cast<uintptr_t>(data), [&](auto vector) {
      const Geometry geometry = make_geometry(sizes, branch, first, count, decltype(vector)::value);
      gather_kernel<T, I, decltype(vector)::value>
          <<<geometry.blocks(), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              geometry, data, index_map.const_data_ptr<I>(), cells.const_data_ptr<I>(), gathered.mutable_data_ptr<T>());
      check_launch();
    });
  });
}

// Adds gathered [count, K * C_in] to the rows of a branch's neighbours.
void scatter_add(
    const Sizes& sizes,
    int64_t branch,
    const at::Tensor& gathered,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    int64_t first,
    int64_t count,
    at::Tensor& grad_features) {
  by_type(gathered.scalar_type(), index_map.scalar_type(), [&](auto type, auto index) {
    using T = decltype(type);
    using I = decltype(index);
    by_vector<T>(sizes, 0, [&](auto vector) { // both are new, hence aligned
      const Geometry geometry = make_geometry(sizes, branch, first, count, decltype(vector)::value);
      scatter_kernel<T, I, decltype(vector)::value>
          <<<geometry.blocks(), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              geometry, gathered.const_data_ptr<T>(), index_map.const_data_ptr<I>(), cells.const_data_ptr<I>(),
              grad_features.mutable_data_ptr<Compute<T>>());
      check_launch();
    });
  });
}

// A type that holds the entries of both.
at::ScalarType index_type(const at::Tensor& index_map, const at::Tensor& cells) {
  return index_map.scalar_type() == at::kInt && cells.scalar_type() == at::kInt ? at::kInt : at::kLong;
}

// [C_out, C_in, kH, kW] to [G, kH * kW * C_in, C_out / G]
at::Tensor kernel_of(const at::Tensor& weight, const Sizes& sizes) {
  return weight.reshape({sizes.branches(), sizes.branch_outputs(), sizes.C_in, sizes.taps()})
      .permute({0, 3, 2, 1})
      .contiguous()
      .view({sizes.branches(), sizes.columns(), sizes.branch_outputs()});
}

// A branch's columns of rows [first, first + count) of a matrix [A, C_out].
at::Tensor outputs_of(const at::Tensor& matrix, const Sizes& sizes, int64_t branch, int64_t first, int64_t count) {
  return matrix.narrow(0, first, count).narrow(1, branch * sizes.branch_outputs(), sizes.branch_outputs());
}

// The gradients of features [N, C_in] and of weight, by gathering.
std::tuple<at::Tensor, at::Tensor> backward_gathered(
    const Sizes& sizes,
    const at::Tensor& grad,
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight) {
  const at::TensorOptions options = features.options().dtype(compute_type(features));
  const at::Tensor kernel = kernel_of(weight, sizes);
  at::Tensor grad_kernel = at::zeros(kernel.sizes(), options);
  at::Tensor padded = at::zeros({sizes.N + 1, sizes.C_in}, options); // the last row is for what is outside
  at::Tensor grad_features = padded.narrow(0, 0, sizes.N);
  const at::Tensor grad_weight =
      grad_kernel.view({sizes.branches(), sizes.taps(), sizes.C_in, sizes.branch_outputs()}).permute({0, 3, 2, 1});
  const bool some = sizes.A > 0 && kernel.numel() > 0, in_order = at::globalContext().deterministicAlgorithms();
  at::Tensor rows; // [G, K, A]
  if (some && in_order) {
    rows = look_up(sizes, index_map, cells);
    rows = at::where(rows.lt(0), sizes.N, rows);
  }
  const int64_t chunk = chunk_of(sizes), chunks = some ? ceil_div(sizes.A, chunk) : 0;
  const at::Tensor memory = at::empty({std::min(chunk, sizes.A), sizes.columns()}, features.options());
  for (int64_t i = 0; i < sizes.branches() * chunks; ++i) {
    const int64_t branch = i / chunks, first = i % chunks * chunk, count = std::min(chunk, sizes.A - first);
    const at::Tensor grad_chunk = outputs_of(grad, sizes, branch, first, count);
    at::Tensor gathered = memory.narrow(0, 0, count), grad_branch = grad_kernel.select(0, branch);
    gather(sizes, branch, features, index_map, cells, first, count, gathered);
    grad_branch.add_(at::cuda::mm(gathered.t(), grad_chunk));
    at::cuda::mm_out(gathered, grad_chunk, kernel.select(0, branch).t());
    if (in_order) { // sorts, which the atomic additions of scatter_add do not need
      padded.index_add_(
          0, rows.select(0, branch).narrow(1, first, count).t().reshape(-1),
          gathered.view({count * sizes.taps(), sizes.C_in}).to(options.dtype()));
    } else {
      scatter_add(sizes, branch, gathered, index_map, cells, first, count, grad_features);
    }
  }
  return {grad_features, grad_weight.reshape(weight.sizes())};
}

} // namespace

at::Tensor forward_cuda(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef dilation) {
  const Sizes sizes = check(features, index_map, cells, weight, bias, dilation);
  const c10::cuda::CUDAGuard guard(features.device());
  const at::ScalarType indices = index_type(index_map, cells);
  const at::Tensor f = features.contiguous();
  const at::Tensor map = index_map.to(indices).contiguous(), places = cells.to(indices).contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  if (tensor_core::takes(sizes, f, at::Tensor())) {
    return tensor_core::forward(sizes, f, look_up(sizes, map, places), weight.contiguous(), b);
  }
  const at::Tensor kernel = kernel_of(weight, sizes);
  at::Tensor output = at::empty({sizes.A, sizes.C_out}, f.options());
  if (output.numel() == 0) {
    return output;
  }
  const int64_t chunk = chunk_of(sizes), chunks = ceil_div(sizes.A, chunk), outputs = sizes.branch_outputs();
  const at::Tensor memory = at::empty({std::min(chunk, sizes.A), sizes.columns()}, f.options());
  for (int64_t i = 0; i < sizes.branches() * chunks; ++i) {
    const int64_t branch = i / chunks, first = i % chunks * chunk, count = std::min(chunk, sizes.A - first);
    at::Tensor gathered = memory.narrow(0, 0, count), out = outputs_of(output, sizes, branch, first, count);
    if (gathered.numel() > 0) {
      gather(sizes, branch, f, map, places, first, count, gathered);
    }
    if (b.defined()) {
      at::cuda::addmm_out(out, b.narrow(0, branch * outputs, outputs), gathered, kernel.select(0, branch));
    } else {
      at::cuda::mm_out(out, gathered, kernel.select(0, branch));
    }
  }
  return output;
}

Gradients backward_cuda(
    const at::Tensor& grad_output,
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    at::IntArrayRef dilation) {
  const Sizes sizes = check(features, index_map, cells, weight, std::nullopt, dilation);
  check_grad_output(grad_output, features, sizes);
  const c10::cuda::CUDAGuard guard(features.device());
  const at::ScalarType indices = index_type(index_map, cells);
  const at::Tensor f = features.contiguous(), grad = grad_output.contiguous();
  const at::Tensor map = index_map.to(indices).contiguous(), places = cells.to(indices).contiguous();
  const bool on_tensor_cores =
      !at::globalContext().deterministicAlgorithms() && tensor_core::takes(sizes, f, grad);
  const auto [grad_features, grad_weight] = on_tensor_cores
      ? tensor_core::backward(sizes, grad, f, look_up(sizes, map, places), weight.contiguous())
      : backward_gathered(sizes, grad, f, map, places, weight);
  return {
      grad_features.to(features.scalar_type()), grad_weight.contiguous().to(weight.scalar_type()),
      grad.sum(0, false, compute_type(features)).to(weight.scalar_type())};
}

} // namespace querymask::sps
