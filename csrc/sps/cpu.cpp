// Convolution on structure-preserving sparsity, on the CPU.
//
// The neighbours' rows of a tile of cells are gathered into a buffer that stays in a core's cache, then multiplied by
// BLAS: the matrix of all neighbours, K times the features, never exists. Tiles and the order of all sums depend on the
// sizes alone, nothing is atomic, and BLAS runs on one thread within a tile, so the result is the same to the last bit
// for any number of threads.

#include "sps.h"

#include <algorithm>
#include <vector>

#include <ATen/CPUFunctions.h>
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

// Where torch's BLAS is MKL, it has this function; elsewhere the address is null.
#ifdef __ELF__
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
#endif

namespace querymask::sps {
namespace {

constexpr int64_t kTileBytes = 1 << 20; // of a gathered tile
constexpr int64_t kMaxTileRows = 2048;
constexpr int64_t kWeightColumns = 256; // columns of the gathered matrix whose weight gradient is one task, at least
constexpr int64_t kBlock = 16; // channels of a task that adds up gradients: no two write to one cache line
constexpr int64_t kSumRows = 256; // rows that are summed before their sum is added to the others'

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows of a tile with that many columns.
template <typename T>
int64_t tile_rows(int64_t columns) {
  const int64_t rows = kTileBytes / (std::max<int64_t>(columns, 1) * static_cast<int64_t>(sizeof(T)));
  return std::clamp<int64_t>(rows / 16 * 16, 16, kMaxTileRows);
}

// Within its life, MKL does not split a product into parts for the threads of the calling one, which it does within a
// parallel region too, where it has but one. The parts' sums have other bits.
class OneBlasThread {
 public:
#ifdef __ELF__
  OneBlasThread() : before_(MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneBlasThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) {
      MKL_Set_Num_Threads_Local(before_);
    }
  }

 private:
  int before_;
#else
  OneBlasThread() {}
#endif
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;
};

// Calls run(begin, end) on parts of [0, count), with BLAS on one thread. Never with less than two parts in all: other
// libraries than MKL know by the parallel region that they have one thread.
template <typename Run>
void in_parallel(int64_t count, const Run& run) {
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    if (begin < std::min(end, count)) {
      const OneBlasThread guard;
      run(begin, std::min(end, count));
    }
  });
}

// Not set, and aligned to cache lines: the bits of a product may depend on that.
template <typename T>
at::Tensor working_memory(int64_t size) {
  return at::empty({size}, at::CppTypeToScalarType<T>::value);
}

// A matrix in memory that someone else owns.
template <typename T>
at::Tensor matrix(T* data, int64_t rows, int64_t columns) {
  return at::from_blob(data, {rows, columns}, at::CppTypeToScalarType<T>::value);
}

// A branch's columns of rows [first, first + count) of a matrix [A, C_out].
template <typename T>
at::Tensor outputs_of(T* data, const Sizes& sizes, int64_t branch, int64_t first, int64_t count) {
  const int64_t outputs = sizes.branch_outputs();
  return at::from_blob(
      data + first * sizes.C_out + branch * outputs, {count, outputs}, {sizes.C_out, 1},
      at::CppTypeToScalarType<T>::value);
}

template <typename T>
at::Tensor transposed_matrix(T* data, int64_t rows, int64_t columns) { // of a matrix [columns, rows]
  return at::from_blob(data, {rows, columns}, {1, rows}, at::CppTypeToScalarType<T>::value);
}

// Where the cells' taps find their rows of features. Taps of all branches are counted: those of one from branch * K on.
template <typename I>
class Neighbours {
 public:
  Neighbours(const Sizes& sizes, const at::Tensor& index_map, const at::Tensor& cells)
      : sizes_(sizes), map_(index_map.const_data_ptr<I>()), cells_(cells.const_data_ptr<I>()) {
    for (int64_t branch = 0; branch < sizes.branches(); ++branch) {
      for (int64_t tap = 0; tap < sizes.taps(); ++tap) {
        steps_y_.push_back((tap / sizes.kW - sizes.kH / 2) * sizes.dilation[2 * branch]);
        steps_x_.push_back((tap % sizes.kW - sizes.kW / 2) * sizes.dilation[2 * branch + 1]);
      }
    }
  }

  const Sizes& sizes() const {
    return sizes_;
  }

  // Calls run(row) for the taps [first_tap, last_tap) of a cell, with -1 for those outside the region.
  template <typename Run>
  void visit(int64_t cell, int64_t first_tap, int64_t last_tap, const Run& run) const {
    const int64_t region = cells_[3 * cell], y = cells_[3 * cell + 1], x = cells_[3 * cell + 2];
    TORCH_CHECK_INDEX(
        region >= 0 && region < sizes_.R && y >= 0 && y < sizes_.H && x >= 0 && x < sizes_.W, "cells[", cell,
        "] (region, y, x) = (", region, ", ", y, ", ", x, ") is outside of index_map [R, H, W] = [", sizes_.R, ", ",
        sizes_.H, ", ", sizes_.W, "]");
    const I* plane = map_ + region * sizes_.H * sizes_.W;
    for (int64_t tap = first_tap; tap < last_tap; ++tap) {
      const int64_t tap_y = y + steps_y_[tap], tap_x = x + steps_x_[tap];
      if (tap_y < 0 || tap_y >= sizes_.H || tap_x < 0 || tap_x >= sizes_.W) {
        run(int64_t(-1));
        continue;
      }
      const int64_t row = plane[tap_y * sizes_.W + tap_x];
      TORCH_CHECK_INDEX(
          row >= 0 && row < sizes_.N, "index_map[", region, ", ", tap_y, ", ", tap_x, "] = ", row,
          " is not one of the ", sizes_.N, " rows of features");
      run(row);
    }
  }

 private:
  Sizes sizes_;
  const I* map_;
  const I* cells_;
  std::vector<int64_t> steps_y_, steps_x_;
};

// Cells [first, first + count) by taps [first_tap, last_tap) by channels.
template <typename T, typename I>
void gather(
    const Neighbours<I>& neighbours,
    const T* features,
    int64_t first,
    int64_t count,
    int64_t first_tap,
    int64_t last_tap,
    T* gathered) {
  const int64_t channels = neighbours.sizes().C_in;
  for (int64_t cell = first; cell < first + count; ++cell) {
    neighbours.visit(cell, first_tap, last_tap, [&](int64_t row) {
      if (row < 0) {
        std::fill_n(gathered, channels, T(0));
      } else {
        std::copy_n(features + row * channels, channels, gathered);
      }
      gathered += channels;
    });
  }
}

// output = gathered * kernel + bias for each branch, with kernel [G, K * C_in, C_out / G]; no bias where it is
// undefined.
template <typename T, typename I>
void forward(
    const Neighbours<I>& neighbours,
    const T* features,
    const at::Tensor& kernel,
    const at::Tensor& bias,
    T* output) {
  const Sizes& sizes = neighbours.sizes();
  const int64_t tile = tile_rows<T>(sizes.columns()), tiles = ceil_div(sizes.A, tile);
  const int64_t outputs = sizes.branch_outputs();
  in_parallel(sizes.branches() * tiles, [&](int64_t begin, int64_t end) {
    const at::Tensor memory = working_memory<T>(tile * sizes.columns());
    T* buffer = memory.mutable_data_ptr<T>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t branch = task / tiles, first = task % tiles * tile, count = std::min(tile, sizes.A - first);
      gather(neighbours, features, first, count, branch * sizes.taps(), (branch + 1) * sizes.taps(), buffer);
      const at::Tensor gathered = matrix(buffer, count, sizes.columns());
      at::Tensor out = outputs_of(output, sizes, branch, first, count);
      if (bias.defined()) {
        at::cpu::addmm_out(out, bias.narrow(0, branch * outputs, outputs), gathered, kernel.select(0, branch));
      } else {
        at::cpu::mm_out(out, gathered, kernel.select(0, branch));
      }
    }
  });
}

// Adds channels [begin, end) of a tile's gradients, of the taps from first_tap on, to their rows, cell after cell.
template <typename T, typename I>
void scatter_add(
    const Neighbours<I>& neighbours,
    const T* gathered,
    int64_t first,
    int64_t count,
    int64_t first_tap,
    int64_t begin,
    int64_t end,
    T* grad_features) {
  const int64_t channels = neighbours.sizes().C_in;
  for (int64_t cell = first; cell < first + count; ++cell) {
    neighbours.visit(cell, first_tap, first_tap + neighbours.sizes().taps(), [&](int64_t row) {
      if (row >= 0) {
        const T* __restrict from = gathered;
        T* __restrict to = grad_features + row * channels;
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
          to[c] += from[c];
        }
      }
      gathered += channels;
    });
  }
}

// grad_features += scatter of grad * kernel^T of all branches. It must be zero before. A wave of tiles, one a thread,
// is multiplied; then each thread adds up its channels of all of them, in the order of branches and cells.
template <typename T, typename I>
void backward_features(const Neighbours<I>& neighbours, const T* grad, const at::Tensor& kernel, T* grad_features) {
  const Sizes& sizes = neighbours.sizes();
  const int64_t tile = tile_rows<T>(sizes.columns()), tiles = ceil_div(sizes.A, tile);
  const int64_t tasks = sizes.branches() * tiles, wave = std::min<int64_t>(tasks, at::get_num_threads());
  const at::Tensor memory = working_memory<T>(wave * tile * sizes.columns());
  const auto gathered = [&](int64_t i) { return memory.mutable_data_ptr<T>() + i * tile * sizes.columns(); };
  for (int64_t first_task = 0; first_task < tasks; first_task += wave) {
    const int64_t here = std::min(wave, tasks - first_task);
    const auto branch = [&](int64_t i) { return (first_task + i) / tiles; };
    const auto first = [&](int64_t i) { return (first_task + i) % tiles * tile; };
    const auto count = [&](int64_t i) { return std::min(tile, sizes.A - first(i)); };
    in_parallel(here, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        at::Tensor product = matrix(gathered(i), count(i), sizes.columns());
        at::cpu::mm_out(
            product, outputs_of(const_cast<T*>(grad), sizes, branch(i), first(i), count(i)),
            kernel.select(0, branch(i)).t());
      }
    });
    in_parallel(ceil_div(sizes.C_in, kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < here; ++i) {
        scatter_add(
            neighbours, gathered(i), first(i), count(i), branch(i) * sizes.taps(), begin * kBlock,
            std::min(end * kBlock, sizes.C_in), grad_features);
      }
    });
  }
}

// grad_kernel [G, K * C_in, C_out / G] = gathered^T * grad. Each task has some taps of a branch and goes through all
// cells.
template <typename T, typename I>
void backward_kernel(const Neighbours<I>& neighbours, const T* features, const T* grad, T* grad_kernel) {
  const Sizes& sizes = neighbours.sizes();
  const int64_t group = std::clamp<int64_t>(kWeightColumns / sizes.C_in, 1, sizes.taps());
  const int64_t groups = ceil_div(sizes.taps(), group), tile = tile_rows<T>(group * sizes.C_in);
  in_parallel(sizes.branches() * groups, [&](int64_t begin, int64_t end) {
    const at::Tensor memory = working_memory<T>(tile * group * sizes.C_in);
    T* buffer = memory.mutable_data_ptr<T>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t branch = task / groups, first_tap = branch * sizes.taps() + task % groups * group;
      const int64_t last_tap = std::min(first_tap + group, (branch + 1) * sizes.taps());
      const int64_t rows = (last_tap - first_tap) * sizes.C_in, outputs = sizes.branch_outputs();
      at::Tensor sum = matrix(grad_kernel + first_tap * sizes.C_in * outputs, rows, outputs);
      for (int64_t first = 0; first < sizes.A; first += tile) {
        const int64_t count = std::min(tile, sizes.A - first);
        gather(neighbours, features, first, count, first_tap, last_tap, buffer);
        at::cpu::addmm_(
            sum, transposed_matrix(buffer, rows, count),
            outputs_of(const_cast<T*>(grad), sizes, branch, first, count), first > 0 ? 1 : 0);
      }
    }
  });
}

// grad_bias [C_out] = sum of the rows of grad; it must be zero before.
template <typename T>
void backward_bias(const Sizes& sizes, const T* grad, T* grad_bias) {
  in_parallel(ceil_div(sizes.C_out, kBlock), [&](int64_t begin, int64_t end) {
    const int64_t first_channel = begin * kBlock, last_channel = std::min(end * kBlock, sizes.C_out);
    std::vector<T> sum(sizes.C_out);
    for (int64_t first = 0; first < sizes.A; first += kSumRows) {
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t n = first; n < std::min(first + kSumRows, sizes.A); ++n) {
        for (int64_t c = first_channel; c < last_channel; ++c) {
          sum[c] += grad[n * sizes.C_out + c];
        }
      }
      for (int64_t c = first_channel; c < last_channel; ++c) {
        grad_bias[c] += sum[c];
      }
    }
  });
}

// The type of the sums: float16 and bfloat16 are converted.
at::ScalarType compute_type(const at::Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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

} // namespace

at::Tensor forward_cpu(
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    at::IntArrayRef dilation) {
  const Sizes sizes = check(features, index_map, cells, weight, bias, dilation);
  const at::ScalarType type = compute_type(features), indices = index_type(index_map, cells);
  const at::Tensor f = features.to(type).contiguous();
  const at::Tensor map = index_map.to(indices).contiguous(), places = cells.to(indices).contiguous();
  const at::Tensor kernel = kernel_of(weight.to(type), sizes), b = bias ? bias->to(type).contiguous() : at::Tensor();
  at::Tensor output = at::empty({sizes.A, sizes.C_out}, f.options());
  if (output.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES(type, "sparse_conv2d", [&] {
      AT_DISPATCH_INDEX_TYPES(indices, "sparse_conv2d", [&] {
        forward<scalar_t>(
            Neighbours<index_t>(sizes, map, places), f.const_data_ptr<scalar_t>(), kernel, b,
            output.mutable_data_ptr<scalar_t>());
      });
    });
  }
  return output.to(features.scalar_type());
}

Gradients backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& features,
    const at::Tensor& index_map,
    const at::Tensor& cells,
    const at::Tensor& weight,
    at::IntArrayRef dilation) {
  const Sizes sizes = check(features, index_map, cells, weight, std::nullopt, dilation);
  check_grad_output(grad_output, features, sizes);
  const at::ScalarType type = compute_type(features), indices = index_type(index_map, cells);
  const at::Tensor f = features.to(type).contiguous(), grad = grad_output.to(type).contiguous();
  const at::Tensor map = index_map.to(indices).contiguous(), places = cells.to(indices).contiguous();
  const at::Tensor kernel = kernel_of(weight.to(type), sizes);
  at::Tensor grad_features = at::zeros(f.sizes(), f.options());
  at::Tensor grad_kernel = at::zeros(kernel.sizes(), kernel.options());
  at::Tensor grad_bias = at::zeros({sizes.C_out}, kernel.options());
  if (sizes.A > 0) {
    AT_DISPATCH_FLOATING_TYPES(type, "sparse_conv2d_backward", [&] {
      AT_DISPATCH_INDEX_TYPES(indices, "sparse_conv2d_backward", [&] {
        const Neighbours<index_t> neighbours(sizes, map, places);
        const scalar_t* grad_data = grad.const_data_ptr<scalar_t>();
        if (kernel.numel() > 0) {
          backward_features<scalar_t>(neighbours, grad_data, kernel, grad_features.mutable_data_ptr<scalar_t>());
          backward_kernel<scalar_t>(
              neighbours, f.const_data_ptr<scalar_t>(), grad_data, grad_kernel.mutable_data_ptr<scalar_t>());
        }
        backward_bias<scalar_t>(sizes, grad_data, grad_bias.mutable_data_ptr<scalar_t>());
      });
    });
  }
  const at::Tensor grad_weight =
      grad_kernel.view({sizes.branches(), sizes.taps(), sizes.C_in, sizes.branch_outputs()}).permute({0, 3, 2, 1});
  return {
      grad_features.to(features.scalar_type()),
      grad_weight.reshape(weight.sizes()).contiguous().to(weight.scalar_type()),
      grad_bias.to(weight.scalar_type())};
}

} // namespace querymask::sps
