// Convolution on structure-preserving sparsity as an implicit GEMM on tensor cores, for sm_80 and later.
//
// The gathered matrix, K times the features, exists nowhere but in shared memory, a tile at a time: asynchronous copies
// bring the neighbours' rows there, zeros for those outside of the region, while the warps multiply what came before.
// Each product of the forward and the backward pass has a kernel:
//   output [A, C_out] = gathered [A, K * C_in] * kernel
//   gradients of gathered = grad [A, C_out] * kernel^T: added from the accumulators to the neighbours' rows
//   gradient of kernel^T [C_out, K * C_in] = grad^T * gathered: cells in parts, whose sums are added in a fixed order
// The grid's z runs over branches. A matrix of outputs [A, C_out] is taken for one of A * G rows: row n * G + g has the
// outputs of cell n and branch g. In the kernels C_out is that of a branch.
// float32 is rounded to TF32, to nearest; sums are in float32.
//
// Everything moves in units of 16 bytes, 4 elements of float32 or 8 of 16 bits: two units of each operand are one step
// of the tensor cores, whatever the type. Several stages of a tile are on their way at once. Units stand in it so that
// no two of those that are read at once share a bank.

#include "cuda.h"

#include <algorithm>
#include <numeric>

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>
#if __has_include(<torch/headeronly/version.h>)
#include <torch/headeronly/version.h>
#endif

#include "../cuda_common.h"
#include "../tensor_core.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define QUERYMASK_TENSOR_CORES 1
#else
#define QUERYMASK_TENSOR_CORES 0 // kernels have no body; `takes` sees by the image that would run
#endif

namespace querymask::sps::tensor_core {
namespace {

constexpr int kThreads = 128; // of a block: four warps
constexpr int kSide = 128; // rows or columns of a tile; the other number is 32, 64 or 128
constexpr int kStages = 2;
constexpr int kDepth = 8; // units of a row in a stage, where rows run along the sum: a line of the L1 cache
constexpr int kWeightStages = 4; // of the gradient of the kernel, whose sum runs over cells
constexpr int kWeightDepth = 4; // a unit's elements times this are a stage's cells
constexpr int64_t kMaxTaps = 64; // whose rows fit beside the tiles in the 99 KB of sm_86 and sm_89
constexpr int64_t kMaxChannels = 1 << 15;
constexpr int64_t kWantedBlocks = 264; // two for each multiprocessor of an H100: parts of the sum over cells

constexpr int stage_units(int rows, int columns, int depth = kDepth) {
  return (rows + columns) * depth;
}

// Where a unit stands in a tile whose rows have that many units.
template <int kUnits>
__device__ int place(int row, int unit) {
  return row * kUnits + (unit ^ (kUnits == 4 ? (row >> 1) & 3 : (row & 3) << 1 | (row >> 2 & 1)));
}

// A warp's share of a tile of rows by columns, in tiles of 16 x 8.
template <int kRows, int kColumns>
struct Share {
  static constexpr int kAcross = kColumns == 32 ? 1 : kRows == 32 ? 4 : 2; // warps beside each other
  static constexpr int kTileRows = kRows * kAcross / 4 / 16, kTileColumns = kColumns / kAcross / 8;

  __device__ static int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kAcross * kTileRows * 16;
  }
  __device__ static int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % kAcross * kTileColumns * 8;
  }
};

#if QUERYMASK_TENSOR_CORES

template <typename T>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8_tf32(sums, a, b);
  } else if constexpr (std::is_same_v<T, at::Half>) {
    mma_m16n8k16_half(sums, a, b);
  } else {
    mma_m16n8k16_bfloat16(sums, a, b);
  }
}

template <typename T, int kCount>
__device__ void round_to_operand(uint32_t (&bits)[kCount]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits[i] = to_tf32(__uint_as_float(bits[i]));
    }
  }
}

// Calls load(chunk) and, when its copies have come, compute(chunk), for chunks from 0 on. Both use the stage chunk %
// kCount.
template <int kCount, typename Load, typename Compute>
__device__ void pipeline(int chunks, const Load& load, const Compute& compute) {
#pragma unroll
  for (int chunk = 0; chunk < kCount - 1; ++chunk) {
    if (chunk < chunks) {
      load(chunk);
    }
    copy_async_commit();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_async_wait<kCount - 2>();
    __syncthreads(); // all copies of this chunk have come, and the stage of the one before is free
    if (chunk + kCount - 1 < chunks) {
      load(chunk + kCount - 1);
    }
    copy_async_commit();
    compute(chunk);
  }
}

#endif

// For each cell the rows of left that its taps pick, one after the other, times right [columns, taps * left_units]
// transposed, of which each branch has its own. The sum runs over a group of units tap after tap, then over the next
// group: so a row that several taps of a tile's cells read comes from the L1 cache. Right's units are in that order.
struct Product {
  const uint4* left;
  const uint4* right;
  int taps, left_units, columns;
  int group, groups; // units of a group, a power of two; groups in a stage
};

#if QUERYMASK_TENSOR_CORES

// Adds up a tile of kSide rows. rows [taps, kSide], in shared memory, are left's, or -1 for zeros; tiles has kStages
// stages.
template <typename T, int kColumns, typename Warp = Share<kSide, kColumns>>
__device__ void multiply(
    const Product& product,
    const int* rows,
    uint4* tiles,
    float (&sums)[Warp::kTileRows][Warp::kTileColumns][4]) {
  constexpr int kStep = kThreads / kDepth; // rows that the block copies at once
  constexpr int kRight = kSide * kDepth; // where right begins in a stage
  const int lane = threadIdx.x % 32, unit = threadIdx.x % kDepth, first = threadIdx.x / kDepth;
  const int depth = product.taps * product.left_units, first_column = blockIdx.y * kColumns + first;

  // Of this thread's unit in the chunk to be loaded:
  int tap = unit / product.group, channel = unit % product.group;
  const int64_t right_row = static_cast<int64_t>(blockIdx.z) * product.columns + first_column;
  const uint4* right_from = product.right + right_row * depth + unit;
  uint4* const to = tiles + place<kDepth>(first, unit);
  const auto wrap = [&] {
    while (tap >= product.taps) {
      tap -= product.taps;
      channel += product.group;
    }
  };
  wrap();
  const auto load = [&](int chunk) {
    uint4* const stage = to + chunk % kStages * stage_units(kSide, kColumns);
    const bool inside = channel < product.left_units;
    const int* from = rows + tap * kSide + first;
    const uint4* left_from = product.left + channel;
#pragma unroll
    for (int i = 0; i < kSide / kStep; ++i) {
      const int row = inside ? from[i * kStep] : -1;
      copy_async_16_cached(
          stage + i * kStep * kDepth, left_from + static_cast<int64_t>(max(row, 0)) * product.left_units, row >= 0);
    }
#pragma unroll
    for (int i = 0; i < kColumns / kStep; ++i) {
      const bool wanted = inside && first_column + i * kStep < product.columns;
      const uint4* source = right_from + static_cast<int64_t>(i * kStep) * depth;
      copy_async_16(stage + kRight + i * kStep * kDepth, wanted ? source : product.right, wanted);
    }
    right_from += kDepth;
    tap += product.groups;
    wrap();
  };

  // Of this lane's row: where the first step's unit is. A step's units are two further, which changes no other bits.
  const int left_at = place<kDepth>(Warp::first_row() + lane % 16, lane / 16);
  const int right_at = kRight + place<kDepth>(Warp::first_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const auto compute = [&](int chunk) {
    const uint4* stage = tiles + chunk % kStages * stage_units(kSide, kColumns);
#pragma unroll
    for (int step = 0; step < kDepth / 2; ++step) {
      uint32_t a[Warp::kTileRows][4], b[Warp::kTileColumns][2];
#pragma unroll
      for (int i = 0; i < Warp::kTileRows; ++i) {
        load_matrix_x4(a[i], stage + (left_at ^ 2 * step) + 16 * i * kDepth);
        round_to_operand<T>(a[i]);
      }
#pragma unroll
      for (int j = 0; j < Warp::kTileColumns; j += 2) {
        uint32_t pair[4];
        load_matrix_x4(pair, stage + (right_at ^ 2 * step) + 8 * j * kDepth);
        b[j][0] = pair[0];
        b[j][1] = pair[1];
        b[j + 1][0] = pair[2];
        b[j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < Warp::kTileRows; ++i) {
#pragma unroll
        for (int j = 0; j < Warp::kTileColumns; ++j) {
          multiply_add<T>(sums[i][j], a[i], b[j]);
        }
      }
    }
  };
  pipeline<kStages>((depth + kDepth - 1) / kDepth, load, compute);
}

#endif

// neighbours [G, K, A] are rows of features, -1 outside of the region.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(
    const __grid_constant__ Product product,
    const int64_t* __restrict__ neighbours,
    int A,
    const T* __restrict__ bias,
    T* __restrict__ output) {
#if QUERYMASK_TENSOR_CORES
  extern __shared__ uint4 shared[];
  using Warp = Share<kSide, kColumns>;
  int* rows = reinterpret_cast<int*>(shared + kStages * stage_units(kSide, kColumns));
  const int first_cell = blockIdx.x * kSide, first_tap = blockIdx.z * product.taps;
  for (int i = threadIdx.x; i < product.taps * kSide; i += kThreads) {
    const int cell = first_cell + i % kSide;
    rows[i] = cell < A ? static_cast<int>(neighbours[static_cast<int64_t>(first_tap + i / kSide) * A + cell]) : -1;
  }
  __syncthreads();
  float sums[Warp::kTileRows][Warp::kTileColumns][4] = {};
  multiply<T, kColumns>(product, rows, shared, sums);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < Warp::kTileColumns; ++j) {
    const int column = blockIdx.y * kColumns + Warp::first_column() + 8 * j + lane % 4 * 2;
    if (column >= product.columns) {
      continue;
    }
    const int output_channel = blockIdx.z * product.columns + column;
    const float lower = bias == nullptr ? 0.f : static_cast<float>(bias[output_channel]);
    const float upper = bias == nullptr ? 0.f : static_cast<float>(bias[output_channel + 1]);
#pragma unroll
    for (int i = 0; i < 2 * Warp::kTileRows; ++i) {
      const int cell = first_cell + Warp::first_row() + 8 * i + lane / 4;
      if (cell < A) {
        const float* pair = sums[i / 2][j] + i % 2 * 2;
        const int64_t row = static_cast<int64_t>(cell) * gridDim.z + blockIdx.z;
        *reinterpret_cast<Vector<T, 2>*>(output + row * product.columns + column) = {
            static_cast<T>(pair[0] + lower), static_cast<T>(pair[1] + upper)};
      }
    }
  }
#endif
}

// The product's left is grad [A * G, C_out], its columns are K * C_in.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) backward_features_kernel(
    const __grid_constant__ Product product,
    const int64_t* __restrict__ neighbours,
    int A,
    int C_in,
    float* __restrict__ grad_features) {
#if QUERYMASK_TENSOR_CORES
  extern __shared__ uint4 shared[];
  using Warp = Share<kSide, kSide>;
  int* rows = reinterpret_cast<int*>(shared + kStages * stage_units(kSide, kSide));
  const int first_cell = blockIdx.x * kSide;
  const int own_cell = first_cell + static_cast<int>(threadIdx.x);
  rows[threadIdx.x] = own_cell < A ? static_cast<int>(own_cell * gridDim.z + blockIdx.z) : -1;
  __syncthreads();
  float sums[Warp::kTileRows][Warp::kTileColumns][4] = {};
  multiply<T, kSide>(product, rows, shared, sums);

  // Through shared memory, so that a warp adds to 512 bytes side by side, if those are of one row.
  constexpr int kUnits = kSide / 4; // of 4 sums
  static_assert(kSide * kUnits <= kStages * stage_units(kSide, kSide));
  const int lane = threadIdx.x % 32;
  __syncthreads(); // everyone is done with the stages
#pragma unroll
  for (int i = 0; i < 2 * Warp::kTileRows; ++i) {
    const int row = Warp::first_row() + 8 * i + lane / 4;
#pragma unroll
    for (int j = 0; j < Warp::kTileColumns; ++j) {
      const float* pair = sums[i / 2][j] + i % 2 * 2;
      uint4* unit = shared + place<kUnits>(row, Warp::first_column() / 4 + 2 * j + lane % 4 / 2);
      reinterpret_cast<float2*>(unit)[lane % 2] = make_float2(pair[0], pair[1]);
    }
  }
  __syncthreads();
  const int column = blockIdx.y * kSide + 4 * lane;
  if (column < product.columns) {
    const int tap = (blockIdx.z * product.columns + column) / C_in; // counted through all branches
    const int64_t* row_of_cell = neighbours + static_cast<int64_t>(tap) * A + first_cell;
    float* channel = grad_features + column % C_in;
    const int end = min(kSide, A - first_cell);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x) / 32; i < end; i += kThreads / 32) {
      const int64_t row = row_of_cell[i];
      if (row >= 0) {
        float channels[4];
        memcpy(channels, shared + place<kUnits>(i, lane), sizeof(channels));
        add<float, 4>(channel + row * C_in, channels);
      }
    }
  }
#endif
}

// A branch's rows of grad [A * G, C_out] transposed, times its gathered [A, K * C_in]. The grid's z runs over parts and
// the branches of each.
struct WeightProduct {
  const uint4* grad;
  const uint4* features;
  const int64_t* neighbours;
  int A, part; // cells, and cells of a part of the sum
  int branches, C_out, columns, grad_units, feature_units;
};

// sums is [parts, G, C_out, K * C_in].
template <typename T, int kOutputs>
__global__ void __launch_bounds__(kThreads, 2)
    backward_weight_kernel(const __grid_constant__ WeightProduct product, float* __restrict__ sums) {
#if QUERYMASK_TENSOR_CORES
  extern __shared__ uint4 shared[];
  using Warp = Share<kOutputs, kSide>;
  constexpr int kUnit = 16 / sizeof(T); // elements
  constexpr int kCells = kWeightDepth * kUnit; // of a chunk
  constexpr int kGradUnits = kOutputs / kUnit, kFeatureUnits = kSide / kUnit; // of a row in a stage
  constexpr int kRight = kCells * kGradUnits; // where features begin in a stage
  constexpr int kGradStep = kThreads / kGradUnits, kFeatureStep = kThreads / kFeatureUnits; // rows copied at once
  constexpr int kGradLoads = kCells / kGradStep, kFeatureLoads = kCells / kFeatureStep; // by one thread
  const int lane = threadIdx.x % 32;
  const int branch = blockIdx.z % product.branches;
  const int begin = blockIdx.z / product.branches * product.part, end = min(product.A, begin + product.part);

  const int grad_unit = threadIdx.x % kGradUnits, grad_row = threadIdx.x / kGradUnits;
  const int grad_column = blockIdx.y * kGradUnits + grad_unit;
  const int grad_stride = product.branches * product.grad_units; // units from a cell to the next
  const uint4* grad_from = product.grad + static_cast<int64_t>(begin + grad_row) * grad_stride +
      branch * product.grad_units + grad_column;
  int grad_to[kGradLoads];
#pragma unroll
  for (int i = 0; i < kGradLoads; ++i) {
    grad_to[i] = place<kGradUnits>(grad_row + i * kGradStep, grad_unit);
  }
  const int unit = threadIdx.x % kFeatureUnits, feature_row = threadIdx.x / kFeatureUnits;
  const int column = blockIdx.x * kFeatureUnits + unit;
  const bool inside = column * kUnit < product.columns;
  const uint4* features = product.features + column % product.feature_units;
  const int tap = (branch * (product.columns / kUnit) + column) / product.feature_units; // counted through all branches
  const int64_t* neighbours = product.neighbours + static_cast<int64_t>(tap) * product.A;
  int feature_to[kFeatureLoads];
#pragma unroll
  for (int i = 0; i < kFeatureLoads; ++i) {
    feature_to[i] = kRight + place<kFeatureUnits>(feature_row + i * kFeatureStep, unit);
  }
  int rows[kFeatureLoads]; // of the chunk to be loaded: looked up one chunk ahead
  const auto look_up = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kFeatureLoads; ++i) {
      const int cell = begin + chunk * kCells + feature_row + i * kFeatureStep;
      rows[i] = inside && cell < end ? static_cast<int>(neighbours[cell]) : -1;
    }
  };
  look_up(0);
  const auto load = [&](int chunk) {
    uint4* stage = shared + chunk % kWeightStages * stage_units(kOutputs, kSide, kWeightDepth);
#pragma unroll
    for (int i = 0; i < kFeatureLoads; ++i) {
      copy_async_16_cached(
          stage + feature_to[i], features + static_cast<int64_t>(max(rows[i], 0)) * product.feature_units,
          rows[i] >= 0);
    }
    const int left = grad_column < product.grad_units ? end - begin - chunk * kCells - grad_row : 0;
#pragma unroll
    for (int i = 0; i < kGradLoads; ++i) {
      const bool wanted = i * kGradStep < left;
      const uint4* source = grad_from + i * kGradStep * grad_stride;
      copy_async_16(stage + grad_to[i], wanted ? source : product.grad, wanted);
    }
    grad_from += kCells * grad_stride;
    look_up(chunk + 1);
  };

  // Where this lane's elements are: for 16 bits those of each load of matrices. For float32 a place is a sum of the
  // lane's, of constants, and of swizzled[i], where i has the lower bits of the constant number of units, and in bit 0
  // the half of a step's cells.
  int grad_at[Warp::kTileRows], feature_at[Warp::kTileColumns / 2], swizzled[8];
#pragma unroll
  for (int i = 0; i < Warp::kTileRows; ++i) {
    grad_at[i] = place<kGradUnits>(lane / 16 * 8 + lane % 8, Warp::first_row() / 8 + 2 * i + lane / 8 % 2);
  }
#pragma unroll
  for (int j = 0; j < Warp::kTileColumns / 2; ++j) {
    feature_at[j] = kRight + place<kFeatureUnits>(lane % 16, Warp::first_column() / 8 + 2 * j + lane / 16);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    swizzled[i] = 4 * (lane / 16 ^ lane % 4 * 2 ^ i) + lane / 4 % 4;
  }
  float totals[Warp::kTileRows][Warp::kTileColumns][4] = {};
  const auto compute = [&](int chunk) {
    const uint4* stage = shared + chunk % kWeightStages * stage_units(kOutputs, kSide, kWeightDepth);
#pragma unroll
    for (int first = 0; first < kCells; first += 2 * kUnit) { // cells of a step
      uint32_t a[Warp::kTileRows][4], b[Warp::kTileColumns][2];
      if constexpr (std::is_same_v<T, float>) {
        const auto* grads = reinterpret_cast<const uint32_t*>(stage + lane % 4 * kGradUnits) + Warp::first_row();
        const auto* inputs =
            reinterpret_cast<const uint32_t*>(stage + kRight + lane % 4 * kFeatureUnits) + Warp::first_column();
#pragma unroll
        for (int i = 0; i < 4 * Warp::kTileRows; ++i) {
          const int at = 16 * (i / 4) + 8 * (i % 2), half = i / 2 % 2;
          a[i / 4][i % 4] = grads[(first + 4 * half) * kOutputs + at / 32 * 32 + swizzled[at / 4 % 8 + half]];
        }
#pragma unroll
        for (int j = 0; j < 2 * Warp::kTileColumns; ++j) {
          const int at = 8 * (j / 2), half = j % 2;
          b[j / 2][half] = inputs[(first + 4 * half) * kSide + at / 32 * 32 + swizzled[at / 4 % 8 + half]];
        }
      } else {
#pragma unroll
        for (int i = 0; i < Warp::kTileRows; ++i) {
          load_matrix_x4_transposed(a[i], stage + grad_at[i] + first * kGradUnits);
        }
#pragma unroll
        for (int j = 0; j < Warp::kTileColumns; j += 2) {
          uint32_t pair[4];
          load_matrix_x4_transposed(pair, stage + feature_at[j / 2] + first * kFeatureUnits);
          b[j][0] = pair[0];
          b[j][1] = pair[1];
          b[j + 1][0] = pair[2];
          b[j + 1][1] = pair[3];
        }
      }
#pragma unroll
      for (int i = 0; i < Warp::kTileRows; ++i) {
        round_to_operand<T>(a[i]);
      }
#pragma unroll
      for (int j = 0; j < Warp::kTileColumns; ++j) {
        round_to_operand<T>(b[j]);
#pragma unroll
        for (int i = 0; i < Warp::kTileRows; ++i) {
          multiply_add<T>(totals[i][j], a[i], b[j]);
        }
      }
    }
  };
  pipeline<kWeightStages>((end - begin + kCells - 1) / kCells, load, compute);

#pragma unroll
  for (int i = 0; i < 2 * Warp::kTileRows; ++i) {
    const int output = blockIdx.y * kOutputs + Warp::first_row() + 8 * i + lane / 4;
#pragma unroll
    for (int j = 0; j < Warp::kTileColumns; ++j) {
      const int at = blockIdx.x * kSide + Warp::first_column() + 8 * j + lane % 4 * 2;
      if (output < product.C_out && at < product.columns) {
        const float* pair = totals[i / 2][j] + i % 2 * 2;
        const int64_t row = static_cast<int64_t>(blockIdx.z) * product.C_out + output;
        *reinterpret_cast<float2*>(sums + row * product.columns + at) = make_float2(pair[0], pair[1]);
      }
    }
  }
#endif
}

// A matrix of four dimensions in another order, rounded as the tensor cores take it.
struct Order {
  int64_t sizes[4]; // of the result
  int64_t strides[4]; // of the source, in the result's order

  int64_t count() const {
    return sizes[0] * sizes[1] * sizes[2] * sizes[3];
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reorder_kernel(const __grid_constant__ Order order, int64_t count, const T* __restrict__ from, T* __restrict__ to) {
#if QUERYMASK_TENSOR_CORES
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) {
    return;
  }
  int64_t left = index, source = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    source += left % order.sizes[i] * order.strides[i];
    left /= order.sizes[i];
  }
  if constexpr (std::is_same_v<T, float>) {
    to[index] = __uint_as_float(to_tf32(from[source]));
  } else {
    to[index] = from[source];
  }
#endif
}

template <typename T>
int units(int64_t elements) {
  return static_cast<int>(elements * static_cast<int64_t>(sizeof(T)) / 16);
}

template <typename T>
const uint4* data(const at::Tensor& tensor) {
  return reinterpret_cast<const uint4*>(tensor.const_data_ptr<T>());
}

// Calls run(element) with an element of the type of a tensor.
template <typename Run>
void by_type(const at::Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return run(float());
    case at::kHalf:
      return run(at::Half());
    default:
      return run(at::BFloat16());
  }
}

// Calls run(width) with a constant: the width of tiles, 32, 64 or 128, that leaves least of them empty.
template <typename Run>
void by_width(int64_t channels, const Run& run) {
  if (channels <= 32) {
    run(std::integral_constant<int, 32>());
  } else if (channels <= 64) {
    run(std::integral_constant<int, 64>());
  } else {
    run(std::integral_constant<int, 128>());
  }
}

// Launches with more shared memory than a kernel may have unasked.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int64_t bytes, Arguments... arguments) {
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<blocks, kThreads, bytes, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  check_launch();
}

int64_t shared_bytes(int units, int64_t numbers) {
  return units * 16 + numbers * static_cast<int64_t>(sizeof(int));
}

template <typename T>
at::Tensor reorder(const at::Tensor& weight, const Order& order) {
  at::Tensor result = at::empty({order.count()}, weight.options());
  reorder_kernel<T><<<static_cast<unsigned>(ceil_div(order.count(), kThreads)), kThreads, 0,
                      c10::cuda::getCurrentCUDAStream()>>>(
      order, order.count(), weight.const_data_ptr<T>(), result.mutable_data_ptr<T>());
  check_launch();
  return result;
}

template <typename T>
at::Tensor backward_features(
    const Sizes& sizes,
    const at::Tensor& grad,
    const at::Tensor& neighbours,
    const at::Tensor& weight) {
  at::Tensor grad_features = at::zeros({sizes.N, sizes.C_in}, grad.options().dtype(at::kFloat));
  const int64_t outputs = sizes.branch_outputs();
  // [G, K, C_in, C_out / G]
  const at::Tensor kernel = reorder<T>(
      weight, {{sizes.branches(), sizes.taps(), sizes.C_in, outputs},
               {outputs * sizes.columns(), 1, sizes.taps(), sizes.columns()}});
  const int depth = units<T>(outputs), columns = static_cast<int>(sizes.columns());
  const int group = std::gcd(depth, kDepth);
  const Product product{data<T>(grad), data<T>(kernel), 1, depth, columns, group, kDepth / group};
  const dim3 blocks(
      static_cast<unsigned>(ceil_div(sizes.A, kSide)), static_cast<unsigned>(ceil_div(columns, kSide)),
      static_cast<unsigned>(sizes.branches()));
  launch(
      backward_features_kernel<T>, blocks, shared_bytes(kStages * stage_units(kSide, kSide), kSide), product,
      neighbours.const_data_ptr<int64_t>(), static_cast<int>(sizes.A), static_cast<int>(sizes.C_in),
      grad_features.mutable_data_ptr<float>());
  return grad_features;
}

template <typename T>
at::Tensor backward_weight(
    const Sizes& sizes,
    const at::Tensor& grad,
    const at::Tensor& features,
    const at::Tensor& neighbours) {
  const int64_t outputs = sizes.branch_outputs(), branches = sizes.branches();
  at::Tensor sums;
  by_width(outputs, [&](auto width) {
    constexpr int kOutputs = decltype(width)::value;
    const int64_t across = ceil_div(sizes.columns(), kSide), down = ceil_div(outputs, kOutputs);
    const int64_t wanted = ceil_div(kWantedBlocks, across * down * branches); // parts
    const int64_t part = ceil_div(ceil_div(sizes.A, wanted), 256) * 256, parts = ceil_div(sizes.A, part);
    sums = at::empty({parts, sizes.C_out, sizes.taps(), sizes.C_in}, grad.options().dtype(at::kFloat));
    const WeightProduct product{
        data<T>(grad),
        data<T>(features),
        neighbours.const_data_ptr<int64_t>(),
        static_cast<int>(sizes.A),
        static_cast<int>(part),
        static_cast<int>(branches),
        static_cast<int>(outputs),
        static_cast<int>(sizes.columns()),
        units<T>(outputs),
        units<T>(sizes.C_in)};
    const dim3 blocks(
        static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(parts * branches));
    launch(
        backward_weight_kernel<T, kOutputs>, blocks,
        shared_bytes(kWeightStages * stage_units(kOutputs, kSide, kWeightDepth), 0), product,
        sums.mutable_data_ptr<float>());
  });
  return sums.sum(0).permute({0, 2, 1}).reshape({sizes.C_out, sizes.C_in, sizes.kH, sizes.kW});
}

// PyTorch's switch for products of matrices.
bool allows_tf32() {
  const at::Context& context = at::globalContext();
#if defined(TORCH_VERSION_MAJOR) && (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10)
  return context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
#else
  return context.allowTF32CuBLAS();
#endif
}

// Whether the image of this file's kernels that this GPU runs has their bodies.
bool has_image() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, reorder_kernel<float>) != cudaSuccess) {
    (void)cudaGetLastError(); // the other way raises it
    return false;
  }
  return attributes.ptxVersion >= 80;
}

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

} // namespace

bool takes(const Sizes& sizes, const at::Tensor& features, const at::Tensor& grad) {
  const at::ScalarType type = features.scalar_type();
  return sizes.A > 0 && (sizes.A + kSide) * sizes.branches() <= INT32_MAX && sizes.N <= INT32_MAX &&
      sizes.taps() <= kMaxTaps && sizes.C_in > 0 && sizes.C_in % 8 == 0 && sizes.C_in <= kMaxChannels &&
      sizes.C_out > 0 && sizes.branch_outputs() % 8 == 0 && sizes.C_out <= kMaxChannels && type != at::kDouble &&
      (type != at::kFloat || allows_tf32()) && is_aligned(features) && (!grad.defined() || is_aligned(grad)) &&
      has_image();
}

at::Tensor forward(
    const Sizes& sizes,
    const at::Tensor& features,
    const at::Tensor& neighbours,
    const at::Tensor& weight,
    const at::Tensor& bias) {
  at::Tensor output = at::empty({sizes.A, sizes.C_out}, features.options());
  const int64_t outputs = sizes.branch_outputs();
  by_type(features, [&](auto element) {
    using T = decltype(element);
    const int depth = units<T>(sizes.C_in), group = std::gcd(depth, kDepth);
    const int64_t channels = group * 16 / static_cast<int64_t>(sizeof(T)); // of a group
    // [C_out, C_in / channels, K, channels]
    const at::Tensor kernel = reorder<T>(
        weight,
        {{sizes.C_out, sizes.C_in / channels, sizes.taps(), channels},
         {sizes.columns(), channels * sizes.taps(), 1, sizes.taps()}});
    const Product product{
        data<T>(features), data<T>(kernel), static_cast<int>(sizes.taps()), depth, static_cast<int>(outputs),
        group, kDepth / group};
    by_width(outputs, [&](auto width) {
      constexpr int kColumns = decltype(width)::value;
      const dim3 blocks(
          static_cast<unsigned>(ceil_div(sizes.A, kSide)), static_cast<unsigned>(ceil_div(outputs, kColumns)),
          static_cast<unsigned>(sizes.branches()));
      launch(
          forward_kernel<T, kColumns>, blocks,
          shared_bytes(kStages * stage_units(kSide, kColumns), sizes.taps() * kSide), product,
          neighbours.const_data_ptr<int64_t>(), static_cast<int>(sizes.A),
          bias.defined() ? bias.const_data_ptr<T>() : nullptr, output.mutable_data_ptr<T>());
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> backward(
    const Sizes& sizes,
    const at::Tensor& grad,
    const at::Tensor& features,
    const at::Tensor& neighbours,
    const at::Tensor& weight) {
  at::Tensor grad_features, grad_weight;
  by_type(features, [&](auto element) {
    using T = decltype(element);
    grad_features = backward_features<T>(sizes, grad, neighbours, weight);
    grad_weight = backward_weight<T>(sizes, grad, features, neighbours);
  });
  return {grad_features, grad_weight};
}

} // namespace querymask::sps::tensor_core
