// Multi-scale deformable attention on the CPU.
//
// The work is split by head: a head's values are first packed into rows that lie next to each other and have a border
// of zeros, then every query gathers from (or scatters to) the packed rows, which fit a core's cache for ordinary maps.
// Each gradient is summed by one thread in the order of the queries, so nothing is atomic and the result is the same to
// the last bit for any number of threads.

#include "msda.h"

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "../isa.h"

namespace querymask::msda {
namespace {

constexpr int64_t kBlock = 16; // channels that are processed together; packed rows are padded to a multiple
constexpr int64_t kGrain = 1 << 16; // multiplications that are worth a thread

struct Level {
  int64_t height, width;
  int64_t token; // of its first pixel in value
  int64_t row; // of its first pixel among the packed rows
  int64_t pitch; // packed rows from one line of pixels to the next
};

// One call: its sizes and the order of the packed rows.
//
// A level of H x W pixels takes (H + 2) * (W + 1) + 1 rows: a line of zeros above and below, and one zero pixel between
// lines that serves as the right border of one and the left border of the next. Two more rows of zeros at the end
// stand for samples whose four neighbours are all outside.
template <typename T>
struct Plan {
  int64_t batch, tokens, heads, channels, queries;
  int64_t samples; // of one query and head, L * P
  int64_t row_stride; // from one token or query to the next in value and output
  int64_t query_stride; // from one query to the next in attention_weights
  int64_t width; // channels padded to a multiple of kBlock
  int64_t rows; // packed rows
  int32_t outside; // the row of samples that are outside
  std::vector<Level> levels;
  std::vector<T> heights, widths; // of the level of each sample, as are the next two
  std::vector<int32_t> pitches, origins;

  Plan(const Sizes& sizes, at::IntArrayRef spatial_shapes)
      : batch(sizes.B),
        tokens(sizes.S),
        heads(sizes.M),
        channels(sizes.D),
        queries(sizes.Q),
        samples(sizes.samples()),
        row_stride(sizes.M * sizes.D),
        query_stride(sizes.M * sizes.samples()),
        width((sizes.D + kBlock - 1) / kBlock * kBlock) {
    int64_t token = 0, first_row = 0;
    for (int64_t l = 0; l < sizes.L; ++l) {
      const int64_t h = spatial_shapes[2 * l], w = spatial_shapes[2 * l + 1];
      const Level level{h, w, token, first_row + w + 2, w + 1};
      levels.push_back(level);
      heights.insert(heights.end(), sizes.P, static_cast<T>(h));
      widths.insert(widths.end(), sizes.P, static_cast<T>(w));
      pitches.insert(pitches.end(), sizes.P, static_cast<int32_t>(level.pitch));
      origins.insert(origins.end(), sizes.P, static_cast<int32_t>(level.row));
      token += h * w;
      first_row += (h + 2) * (w + 1) + 1;
    }
    rows = first_row + 2;
    outside = static_cast<int32_t>(first_row);
    TORCH_CHECK_VALUE(rows < INT32_MAX, "value has too many tokens for the CPU operator: ", tokens);
  }

  int64_t pairs() const { // of image and head
    return batch * heads;
  }
  int64_t value_offset(int64_t pair) const {
    return (pair / heads) * tokens * row_stride + (pair % heads) * channels;
  }
  int64_t output_offset(int64_t pair, int64_t query) const {
    return ((pair / heads) * queries + query) * row_stride + (pair % heads) * channels;
  }
  int64_t weight_offset(int64_t pair, int64_t query) const {
    return ((pair / heads) * queries + query) * query_stride + (pair % heads) * samples;
  }
  int64_t grain() const {
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 4 * samples * width));
  }
};

// A thread's working memory for the samples of one query.
template <typename T>
struct Samples {
  std::vector<int32_t> rows, steps; // of the upper left neighbour; from there to the lower left one
  std::vector<T> fractions_x, fractions_y;
  std::vector<T> corners; // [4, samples]: a number for each neighbour
  std::vector<T> row; // [width]

  explicit Samples(const Plan<T>& plan)
      : rows(plan.samples),
        steps(plan.samples),
        fractions_x(plan.samples),
        fractions_y(plan.samples),
        corners(4 * plan.samples),
        row(plan.width) {}
};

// Packed rows: zeros that begin at a cache line.
template <typename T>
class Rows {
 public:
  Rows(int64_t rows, int64_t width)
      : size_(rows * width), data_(static_cast<T*>(::operator new[](sizeof(T) * size_, kAlignment))) {
    clear(size_);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  ~Rows() {
    ::operator delete[](data_, kAlignment);
  }

  void clear(int64_t count) {
    std::fill_n(data_, count, T(0));
  }
  T* data() {
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t size_;
  T* data_;
};

} // namespace
} // namespace querymask::msda

#define QUERYMASK_ISA_SOURCE "msda/cpu_kernel.h"
#include "../foreach_isa.h"

namespace querymask::msda {
namespace {

// Calls run(constant) with the width as a compile-time constant where it is a usual one, else with 0.
template <typename Run>
void by_width(int64_t width, const Run& run) {
  switch (width) {
    case 16:
      return run(std::integral_constant<int, 16>());
    case 32:
      return run(std::integral_constant<int, 32>());
    case 48:
      return run(std::integral_constant<int, 48>());
    case 64:
      return run(std::integral_constant<int, 64>());
    default:
      return run(std::integral_constant<int, 0>());
  }
}

// Calls run(pair, first, last) for the parts [first, last) of every pair that fall in [begin, end) of all pairs' parts.
template <typename Run>
void for_each_pair(int64_t begin, int64_t end, int64_t parts, const Run& run) {
  while (begin < end) {
    const int64_t pair = begin / parts, first = begin % parts;
    const int64_t last = std::min(parts, first + end - begin);
    run(pair, first, last);
    begin += last - first;
  }
}

template <typename T>
void forward(const Plan<T>& plan, const T* value, const T* locations, const T* attention, T* output) {
  at::parallel_for(0, plan.pairs() * plan.queries, plan.grain(), [&](int64_t begin, int64_t end) {
    Rows<T> rows(plan.rows, plan.width); // borders and padding stay zero from one head to the next
    Samples<T> samples(plan);
    for_each_pair(begin, end, plan.queries, [&](int64_t pair, int64_t first, int64_t last) {
      const int64_t offset = plan.weight_offset(pair, first);
      by_width(plan.width, [&](auto width) {
        QUERYMASK_BY_ISA(pack<T, decltype(width)::value>)(plan, value + plan.value_offset(pair), rows.data());
        QUERYMASK_BY_ISA(forward<T, decltype(width)::value>)
        (plan, rows.data(), locations + 2 * offset, attention + offset, last - first, samples,
         output + plan.output_offset(pair, first));
      });
    });
  });
}

template <typename T>
void backward_samples(
    const Plan<T>& plan,
    const T* value,
    const T* locations,
    const T* attention,
    const T* grad_output,
    T* grad_locations,
    T* grad_attention) {
  at::parallel_for(0, plan.pairs() * plan.queries, plan.grain(), [&](int64_t begin, int64_t end) {
    Rows<T> rows(plan.rows, plan.width); // borders and padding stay zero from one head to the next
    Samples<T> samples(plan);
    for_each_pair(begin, end, plan.queries, [&](int64_t pair, int64_t first, int64_t last) {
      const int64_t offset = plan.weight_offset(pair, first);
      by_width(plan.width, [&](auto width) {
        QUERYMASK_BY_ISA(pack<T, decltype(width)::value>)(plan, value + plan.value_offset(pair), rows.data());
        QUERYMASK_BY_ISA(backward_samples<T, decltype(width)::value>)
        (plan, rows.data(), locations + 2 * offset, attention + offset, grad_output + plan.output_offset(pair, first),
         last - first, samples, grad_locations + 2 * offset, grad_attention + offset);
      });
    });
  });
}

template <typename T>
void backward_value(const Plan<T>& plan, const T* locations, const T* attention, const T* grad_output, T* grad_value) {
  const int64_t blocks = plan.width / kBlock;
  at::parallel_for(0, plan.pairs() * blocks, 1, [&](int64_t begin, int64_t end) {
    Rows<T> rows(plan.rows, plan.width);
    Samples<T> samples(plan);
    for_each_pair(begin, end, blocks, [&](int64_t pair, int64_t first, int64_t last) {
      const int64_t channel = first * kBlock, padded = (last - first) * kBlock;
      const int64_t channels = std::min(plan.channels - channel, padded);
      const int64_t offset = plan.weight_offset(pair, 0);
      rows.clear(plan.rows * padded);
      by_width(padded, [&](auto width) {
        QUERYMASK_BY_ISA(backward_value<T, decltype(width)::value>)
        (plan, locations + 2 * offset, attention + offset, grad_output + plan.output_offset(pair, 0) + channel,
         channels, padded, samples, rows.data());
        QUERYMASK_BY_ISA(unpack<T, decltype(width)::value>)
        (plan, rows.data(), padded, channels, grad_value + plan.value_offset(pair) + channel);
      });
    });
  });
}

// The type that the loops run in: float16 and bfloat16 are converted.
at::ScalarType compute_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

} // namespace

at::Tensor forward_cpu(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check(value, spatial_shapes, sampling_locations, attention_weights);
  const at::ScalarType type = compute_type(value);
  const at::Tensor v = value.to(type).contiguous();
  const at::Tensor locations = sampling_locations.to(type).contiguous();
  const at::Tensor attention = attention_weights.to(type).contiguous();
  at::Tensor output = at::empty({sizes.B, sizes.Q, sizes.M * sizes.D}, v.options());
  if (output.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES(type, "multi_scale_deformable_attention", [&] {
      forward<scalar_t>(
          Plan<scalar_t>(sizes, spatial_shapes), v.const_data_ptr<scalar_t>(), locations.const_data_ptr<scalar_t>(),
          attention.const_data_ptr<scalar_t>(), output.mutable_data_ptr<scalar_t>());
    });
  }
  return output.to(value.scalar_type());
}

Gradients backward_cpu(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  const at::ScalarType type = compute_type(value);
  const at::Tensor v = value.to(type).contiguous();
  const at::Tensor locations = sampling_locations.to(type).contiguous();
  const at::Tensor attention = attention_weights.to(type).contiguous();
  const at::Tensor grad = grad_output.to(type).contiguous();
  at::Tensor grad_value = at::empty(v.sizes(), v.options());
  at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_attention = at::empty(attention.sizes(), attention.options());
  AT_DISPATCH_FLOATING_TYPES(type, "multi_scale_deformable_attention_backward", [&] {
    const Plan<scalar_t> plan(sizes, spatial_shapes);
    const scalar_t* locations_data = locations.const_data_ptr<scalar_t>();
    const scalar_t* attention_data = attention.const_data_ptr<scalar_t>();
    const scalar_t* grad_data = grad.const_data_ptr<scalar_t>();
    if (grad_attention.numel() > 0) {
      backward_samples<scalar_t>(
          plan, v.const_data_ptr<scalar_t>(), locations_data, attention_data, grad_data,
          grad_locations.mutable_data_ptr<scalar_t>(), grad_attention.mutable_data_ptr<scalar_t>());
    }
    if (grad_value.numel() > 0) {
      backward_value<scalar_t>(
          plan, locations_data, attention_data, grad_data, grad_value.mutable_data_ptr<scalar_t>());
    }
  });
  return {
      grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
      grad_attention.to(attention_weights.scalar_type())};
}

} // namespace querymask::msda
