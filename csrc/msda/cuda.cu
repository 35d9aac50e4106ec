// Multi-scale deformable attention on CUDA.
//
// A group of threads serves one query and head; each thread owns a vector of channels (16 bytes where D allows it). The
// samples' coordinates are computed once: the threads of a group prepare one sample each, leave the four neighbours and
// weights in shared memory, and then all of them read them back, sample after sample. A neighbour outside the map is
// a load that is predicated off: no branch at borders, and whatever stands elsewhere in memory cannot turn a zero into
// NaN. A block serves a tile of queries of one head, 8 pixels wide where the queries are the tokens
// themselves (encoders), so that neighbouring queries find each other's values in the L1 cache.

#include "msda.h"

#include <algorithm>
#include <type_traits>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda_common.h"

namespace querymask::msda {
namespace {

constexpr int kThreads = 512; // of a block
constexpr int kTileWidth = 8; // queries
constexpr int kMaxLevels = 32;
constexpr unsigned kWarp = 0xffffffffu;

// The sizes of a call as kernels take them.
struct Geometry {
  int64_t B, S, Q;
  int M, D, L, P;
  int group; // threads of one query and head: a power of two, at most 32
  bool tiled; // whether the queries are the tokens, and a block serves a tile of them
  unsigned blocks; // for one head
  int height[kMaxLevels], width[kMaxLevels], token[kMaxLevels]; // token: of the first pixel
  unsigned first_tile[kMaxLevels + 1];
};

// One sample: what its query's threads need to know, in one 16-byte read for float.
template <typename C>
struct alignas(16) Sample {
  C x, y; // fractions
  C attention;
  int code; // 16 * the token of the upper left neighbour + which neighbours are inside, all bits zero for none

  // Whether the upper left, upper right, lower left or lower right neighbour is inside.
  __device__ bool has(int corner) const {
    const int bits = (corner & 1 ? kRight : kLeft) | (corner & 2 ? kLower : kUpper);
    return (code & bits) == bits;
  }
  __device__ int token() const { // may be negative where the neighbour is outside
    return code >> 4;
  }
  __device__ C weight(int corner) const {
    return (corner & 2 ? y : C(1) - y) * (corner & 1 ? x : C(1) - x) * attention;
  }

  static constexpr int kLeft = 1, kRight = 2, kUpper = 4, kLower = 8;
};

// The query that a group of a block serves, or -1.
__device__ int64_t query_of(const Geometry& geometry, unsigned block, int member, int members) {
  if (!geometry.tiled) {
    const int64_t query = static_cast<int64_t>(block) * members + member;
    return query < geometry.Q ? query : -1;
  }
  int level = 0;
  while (block >= geometry.first_tile[level + 1]) {
    ++level;
  }
  const unsigned tile = block - geometry.first_tile[level];
  const unsigned columns = (geometry.width[level] + kTileWidth - 1) / kTileWidth;
  const int x = tile % columns * kTileWidth + member % kTileWidth;
  const int y = tile / columns * (members / kTileWidth) + member / kTileWidth;
  const bool exists = x < geometry.width[level] && y < geometry.height[level];
  return exists ? geometry.token[level] + static_cast<int64_t>(y) * geometry.width[level] + x : -1;
}

// Reads sample `index` of a query and head; `offset` is the position of its first sample in attention_weights.
template <typename T, typename C>
__device__ Sample<C> prepare(
    const Geometry& geometry,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    int64_t offset,
    int index) {
  Sample<C> sample;
  const int level = index / geometry.P;
  const int height = geometry.height[level], width = geometry.width[level];
  const C x = locations[2 * (offset + index)] * static_cast<C>(width) - C(0.5);
  const C y = locations[2 * (offset + index) + 1] * static_cast<C>(height) - C(0.5);
  // False for NaN too, so that only numbers within the map are converted to integers.
  const bool inside = x >= C(-1) && x < static_cast<C>(width) && y >= C(-1) && y < static_cast<C>(height);
  const int column = inside ? static_cast<int>(floor(x)) : 0, line = inside ? static_cast<int>(floor(y)) : 0;
  const int bits = (column >= 0 ? sample.kLeft : 0) | (column + 1 < width ? sample.kRight : 0) |
      (line >= 0 ? sample.kUpper : 0) | (line + 1 < height ? sample.kLower : 0);
  sample.x = inside ? x - static_cast<C>(column) : C(0);
  sample.y = inside ? y - static_cast<C>(line) : C(0);
  sample.attention = static_cast<C>(attention[offset + index]);
  sample.code = 16 * (geometry.token[level] + line * width + column) + (inside ? bits : 0);
  return sample;
}

// The channels that a thread owns of one row, or zeros where the row is not wanted.
template <typename C, typename T, int kVector>
__device__ void load(const T* __restrict__ row, bool wanted, C (&channels)[kVector]) {
  Vector<T, kVector> loaded{};
  if (wanted) {
    loaded = *reinterpret_cast<const Vector<T, kVector>*>(row);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    channels[i] = static_cast<C>(loaded.values[i]);
  }
}

// The part of shared memory for one group's samples: one more than there are, so that groups lie in different banks.
template <typename C, int kGroup>
struct SharedSamples {
  Sample<C> samples[kGroup > 0 ? (kThreads / kGroup) * (kGroup + 1) : 2 * kThreads];
};

// kGroup: geometry.group as a constant, or 0.
template <typename T, typename C, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ value,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    T* __restrict__ output) {
  __shared__ SharedSamples<C, kGroup> shared;
  const int group = kGroup > 0 ? kGroup : geometry.group;
  const int member = threadIdx.x / group, lane = threadIdx.x % group;
  Sample<C>* samples = shared.samples + member * (group + 1);
  const int64_t query = query_of(geometry, blockIdx.x, member, kThreads / group);
  const int64_t row_stride = static_cast<int64_t>(geometry.M) * geometry.D;
  const int count = geometry.L * geometry.P;

  for (int64_t pair = blockIdx.y; pair < geometry.B * geometry.M; pair += gridDim.y) {
    const int64_t image = pair / geometry.M, head = pair % geometry.M;
    const T* head_value = value + image * geometry.S * row_stride + head * geometry.D;
    const int64_t place = (image * geometry.Q + query) * geometry.M + head; // not used where query is -1
    for (int first = 0; first < geometry.D; first += group * kVector) { // once, unless a head is very wide
      const int channel = first + lane * kVector;
      const bool wanted = query >= 0 && channel < geometry.D;
      C sum[kVector] = {};
      int level = 0, point = 0; // of the next sample
      for (int begin = 0; begin < count; begin += group) {
        __syncwarp(kWarp); // everyone is done with the samples before
        if (query >= 0 && begin + lane < count) {
          samples[lane] = prepare<T, C>(geometry, locations, attention, place * count, begin + lane);
        }
        __syncwarp(kWarp);
        if (!wanted) {
          continue;
        }
        const int end = min(group, count - begin);
#pragma unroll 2
        for (int n = 0; n < end; ++n) {
          const Sample<C> sample = samples[n];
          const T* row = head_value + channel + sample.token() * row_stride;
          const int64_t line_stride = geometry.width[level] * row_stride;
          if (++point == geometry.P) {
            point = 0;
            ++level;
          }
          C corners[4][kVector];
#pragma unroll
          for (int k = 0; k < 4; ++k) { // all loads first
            const int64_t step = (k & 1 ? row_stride : 0) + (k & 2 ? line_stride : 0);
            load<C, T, kVector>(row + step, sample.has(k), corners[k]);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const C weight = sample.weight(k);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              sum[i] += weight * corners[k][i];
            }
          }
        }
      }
      if (wanted) {
        Vector<T, kVector> result;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          result.values[i] = static_cast<T>(sum[i]);
        }
        *reinterpret_cast<Vector<T, kVector>*>(output + place * geometry.D + channel) = result;
      }
    }
  }
}

// grad_value must be zero before; it is in C, so that float16 and bfloat16 are summed in float32.
template <typename T, typename C, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ grad_output,
    const T* __restrict__ value,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    C* __restrict__ grad_value,
    C* __restrict__ grad_locations,
    C* __restrict__ grad_attention) {
  __shared__ SharedSamples<C, kGroup> shared;
  const int group = kGroup > 0 ? kGroup : geometry.group;
  const int member = threadIdx.x / group, lane = threadIdx.x % group;
  Sample<C>* samples = shared.samples + member * (group + 1);
  const int64_t query = query_of(geometry, blockIdx.x, member, kThreads / group);
  const int64_t row_stride = static_cast<int64_t>(geometry.M) * geometry.D;
  const int count = geometry.L * geometry.P;

  for (int64_t pair = blockIdx.y; pair < geometry.B * geometry.M; pair += gridDim.y) {
    const int64_t image = pair / geometry.M, head = pair % geometry.M;
    const int64_t head_offset = image * geometry.S * row_stride + head * geometry.D;
    const int64_t place = (image * geometry.Q + query) * geometry.M + head; // not used where query is -1
    for (int first = 0; first < geometry.D; first += group * kVector) { // once, unless a head is very wide
      const int channel = first + lane * kVector;
      const bool wanted = query >= 0 && channel < geometry.D;
      C grad[kVector];
      int level = 0, point = 0; // of the next sample
      load<C, T, kVector>(grad_output + place * geometry.D + channel, wanted, grad);
      for (int begin = 0; begin < count; begin += group) {
        __syncwarp(kWarp); // everyone is done with the samples before
        if (query >= 0 && begin + lane < count) {
          samples[lane] = prepare<T, C>(geometry, locations, attention, place * count, begin + lane);
        }
        __syncwarp(kWarp);
        const int end = min(group, count - begin); // the same for the whole warp
        C my_attention = C(0), my_x = C(0), my_y = C(0); // gradients of the sample that this thread prepared
        for (int n = 0; n < end; ++n) {
          C dots[4] = {};
          Sample<C> sample{};
          if (wanted) {
            sample = samples[n];
            const int64_t row = head_offset + channel + sample.token() * row_stride;
            const int64_t line_stride = geometry.width[level] * row_stride;
            C corners[4][kVector];
#pragma unroll
            for (int k = 0; k < 4; ++k) { // all loads first
              const int64_t step = (k & 1 ? row_stride : 0) + (k & 2 ? line_stride : 0);
              load<C, T, kVector>(value + row + step, sample.has(k), corners[k]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const int64_t step = (k & 1 ? row_stride : 0) + (k & 2 ? line_stride : 0);
              const C weight = sample.weight(k);
              C share[kVector];
#pragma unroll
              for (int i = 0; i < kVector; ++i) {
                dots[k] += grad[i] * corners[k][i];
                share[i] = weight * grad[i];
              }
              if (sample.has(k)) {
                add<C, kVector>(grad_value + row + step, share);
              }
            }
          }
          const C upper = dots[1] - dots[0], lower = dots[3] - dots[2];
          const C left = dots[2] - dots[0], right = dots[3] - dots[1];
          C by_attention = dots[0] + sample.x * upper + sample.y * (left + sample.x * (right - left));
          C by_x = upper + sample.y * (lower - upper);
          C by_y = left + sample.x * (right - left);
          for (int distance = group / 2; distance > 0; distance /= 2) { // within the group: it is aligned in the warp
            by_attention += __shfl_xor_sync(kWarp, by_attention, distance);
            by_x += __shfl_xor_sync(kWarp, by_x, distance);
            by_y += __shfl_xor_sync(kWarp, by_y, distance);
          }
          if (++point == geometry.P) {
            point = 0;
            ++level;
          }
          if (n == lane) {
            my_attention = by_attention;
            my_x = by_x;
            my_y = by_y;
          }
        }
        if (query >= 0 && begin + lane < count) {
          const C my_weight = samples[lane].attention;
          const int my_level = (begin + lane) / geometry.P;
          const int64_t offset = place * count + begin + lane;
          C* location = grad_locations + 2 * offset;
          const C x = my_x * my_weight * static_cast<C>(geometry.width[my_level]);
          const C y = my_y * my_weight * static_cast<C>(geometry.height[my_level]);
          const bool further = first > 0; // this thread has written the part of other channels
          grad_attention[offset] = my_attention + (further ? grad_attention[offset] : C(0));
          location[0] = x + (further ? location[0] : C(0));
          location[1] = y + (further ? location[1] : C(0));
        }
      }
    }
  }
}

Geometry make_geometry(const Sizes& sizes, at::IntArrayRef spatial_shapes, int vector) {
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
  geometry.group = 1;
  while (geometry.group < 32 && geometry.group * vector < sizes.D) {
    geometry.group *= 2;
  }
  const int64_t members = kThreads / geometry.group;
  geometry.tiled = sizes.Q == sizes.S;
  int64_t token = 0, tiles = 0;
  for (int64_t l = 0; l < sizes.L; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    geometry.height[l] = static_cast<int>(height);
    geometry.width[l] = static_cast<int>(width);
    geometry.token[l] = static_cast<int>(token);
    geometry.first_tile[l] = static_cast<unsigned>(tiles);
    token += height * width;
    const int64_t tile_height = members / kTileWidth;
    tiles += (height + tile_height - 1) / tile_height * ((width + kTileWidth - 1) / kTileWidth);
  }
  geometry.first_tile[sizes.L] = static_cast<unsigned>(tiles);
  const int64_t blocks = geometry.tiled ? tiles : (sizes.Q + members - 1) / members;
  TORCH_CHECK_VALUE(blocks < INT32_MAX, "too many queries for the CUDA operator: ", sizes.Q);
  geometry.blocks = static_cast<unsigned>(blocks);
  return geometry;
}

dim3 grid_of(const Geometry& geometry) {
  return dim3(geometry.blocks, static_cast<unsigned>(std::min<int64_t>(geometry.B * geometry.M, 65535)));
}

// Calls run(vector, group) with constants: the widest vector of channels that D and the pointers' alignment allow, and
// the size of a group for heads of 32 channels, or 0.
template <typename T, typename Run>
void by_vector(const Sizes& sizes, at::IntArrayRef spatial_shapes, uintptr_t pointers, const Run& run) {
  constexpr int kWidest = 16 / sizeof(T);
  if (sizes.D % kWidest != 0 || pointers % 16 != 0) {
    run(std::integral_constant<int, 1>(), std::integral_constant<int, 0>(), make_geometry(sizes, spatial_shapes, 1));
    return;
  }
  const Geometry geometry = make_geometry(sizes, spatial_shapes, kWidest);
  if (sizes.D == 32) {
    run(std::integral_constant<int, kWidest>(), std::integral_constant<int, 32 / kWidest>(), geometry);
  } else {
    run(std::integral_constant<int, kWidest>(), std::integral_constant<int, 0>(), geometry);
  }
}

} // namespace

at::Tensor forward_cuda(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check(value, spatial_shapes, sampling_locations, attention_weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor v = value.contiguous();
  const at::Tensor locations = sampling_locations.to(compute_type(value)).contiguous();
  const at::Tensor attention = attention_weights.contiguous();
  at::Tensor output = at::empty({sizes.B, sizes.Q, sizes.M * sizes.D}, v.options());
  if (output.numel() == 0) {
    return output;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, v.scalar_type(), "multi_scale_deformable_attention", [&] {
    using C = Compute<scalar_t>;
    const scalar_t* v_data = v.const_data_ptr<scalar_t>();
    by_vector<scalar_t>(
        sizes, spatial_shapes, reinterpret_cast<uintptr_t>(v_data),
        [&](auto vector, auto group, const Geometry& geometry) {
          forward_kernel<scalar_t, C, decltype(vector)::value, decltype(group)::value>
              <<<grid_of(geometry), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                  geometry, v_data, locations.const_data_ptr<C>(), attention.const_data_ptr<scalar_t>(),
                  output.mutable_data_ptr<scalar_t>());
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
  // Atomic additions come in any order.
  at::globalContext().alertNotDeterministic("multi_scale_deformable_attention_backward_cuda");
  const c10::cuda::CUDAGuard guard(value.device());
  const at::ScalarType type = compute_type(value);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor v = value.contiguous();
  const at::Tensor locations = sampling_locations.to(type).contiguous();
  const at::Tensor attention = attention_weights.contiguous();
  at::Tensor grad_value = at::zeros(v.sizes(), v.options().dtype(type));
  at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_attention = at::empty(attention.sizes(), attention.options().dtype(type));
  if (grad.numel() > 0 && attention.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, v.scalar_type(), "multi_scale_deformable_attention_backward", [&] {
          using C = Compute<scalar_t>;
          const scalar_t* v_data = v.const_data_ptr<scalar_t>();
          const scalar_t* grad_data = grad.const_data_ptr<scalar_t>();
          const uintptr_t pointers = reinterpret_cast<uintptr_t>(v_data) | reinterpret_cast<uintptr_t>(grad_data);
          by_vector<scalar_t>(sizes, spatial_shapes, pointers, [&](auto vector, auto group, const Geometry& geometry) {
            backward_kernel<scalar_t, C, decltype(vector)::value, decltype(group)::value>
                <<<grid_of(geometry), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                    geometry, grad_data, v_data, locations.const_data_ptr<C>(), attention.const_data_ptr<scalar_t>(),
                    grad_value.mutable_data_ptr<C>(), grad_locations.mutable_data_ptr<C>(),
                    grad_attention.mutable_data_ptr<C>());
            check_launch();
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
