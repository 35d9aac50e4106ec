// The loops of multi-scale deformable attention over one head. No include guard: foreach_isa.h compiles this file once
// for each instruction set. Every inner loop runs over a multiple of 16 channels, a compile-time constant for the usual
// head widths, so that compilers vectorise it without intrinsics.
//
// Rows are pixels of the head, `kWidth` channels each (plan.width where kWidth is 0). See Plan in cpu.cpp for their
// order: every sample finds its four neighbours without a test, those outside the map being rows of zeros.

namespace querymask::msda::QUERYMASK_ISA {

// Copies `channels` numbers, fast where they fill the width.
template <typename T, int kWidth>
inline void copy_row(const T* __restrict from, int64_t channels, T* __restrict to) {
  if (kWidth > 0 && channels == kWidth) {
#pragma omp simd
    for (int d = 0; d < kWidth; ++d) {
      to[d] = from[d];
    }
  } else {
    for (int64_t d = 0; d < channels; ++d) {
      to[d] = from[d];
    }
  }
}

// Working memory for the channels of one query.
template <typename T, int kWidth>
struct Row {
  T values[kWidth];

  explicit Row(Samples<T>&) {}
  T& operator[](int64_t d) {
    return values[d];
  }
};

template <typename T>
struct Row<T, 0> {
  T* __restrict values;

  explicit Row(Samples<T>& samples) : values(samples.row.data()) {}
  T& operator[](int64_t d) {
    return values[d];
  }
};

// Copies a head's values, [S, D] with row_stride from one token to the next, into the packed rows.
template <typename T, int kWidth>
void pack(const Plan<T>& plan, const T* __restrict value, T* __restrict rows) {
  const int64_t width = kWidth > 0 ? kWidth : plan.width;
  for (const Level& level : plan.levels) {
    for (int64_t y = 0; y < level.height; ++y) {
      const T* __restrict from = value + (level.token + y * level.width) * plan.row_stride;
      T* __restrict to = rows + (level.row + y * level.pitch) * width;
      for (int64_t x = 0; x < level.width; ++x) {
        copy_row<T, kWidth>(from + x * plan.row_stride, plan.channels, to + x * width);
      }
    }
  }
}

// The way back for the gradient, of a block of channels.
template <typename T, int kWidth>
void unpack(
    const Plan<T>& plan,
    const T* __restrict rows,
    int64_t runtime_width,
    int64_t channels,
    T* __restrict grad_value) {
  const int64_t width = kWidth > 0 ? kWidth : runtime_width;
  for (const Level& level : plan.levels) {
    for (int64_t y = 0; y < level.height; ++y) {
      const T* __restrict from = rows + (level.row + y * level.pitch) * width;
      T* __restrict to = grad_value + (level.token + y * level.width) * plan.row_stride;
      for (int64_t x = 0; x < level.width; ++x) {
        copy_row<T, kWidth>(from + x * width, channels, to + x * plan.row_stride);
      }
    }
  }
}

// Turns the locations of one query's samples into the row of the upper left neighbour and the fractions.
template <typename T>
inline void locate(const Plan<T>& plan, const T* __restrict locations, Samples<T>& samples) {
  const T* __restrict heights = plan.heights.data();
  const T* __restrict widths = plan.widths.data();
  const int32_t* __restrict pitches = plan.pitches.data();
  const int32_t* __restrict origins = plan.origins.data();
  int32_t* __restrict rows = samples.rows.data();
  int32_t* __restrict steps = samples.steps.data();
  T* __restrict fractions_x = samples.fractions_x.data();
  T* __restrict fractions_y = samples.fractions_y.data();
  const int32_t outside = plan.outside;
  const int64_t count = plan.samples;
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) {
    const T width = widths[n], height = heights[n];
    const int32_t pitch = pitches[n], origin = origins[n];
    const T x = locations[2 * n] * width - T(0.5), y = locations[2 * n + 1] * height - T(0.5);
    // Only numbers within the map are converted to integers; comparisons with NaN are false.
    const T safe_x = x >= T(-1) ? (x < width ? x : T(-2)) : T(-2);
    const T safe_y = y >= T(-1) ? (y < height ? y : T(-2)) : T(-2);
    int32_t column = static_cast<int32_t>(safe_x), line = static_cast<int32_t>(safe_y); // towards zero,
    column -= safe_x < static_cast<T>(column) ? 1 : 0; // hence floor
    line -= safe_y < static_cast<T>(line) ? 1 : 0;
    fractions_x[n] = safe_x - static_cast<T>(column);
    fractions_y[n] = safe_y - static_cast<T>(line);
    const int32_t inside = -static_cast<int32_t>((column > -2) & (line > -2)); // all bits
    const int32_t row = origin + line * pitch + column;
    rows[n] = outside + ((row - outside) & inside);
    steps[n] = pitch & inside;
  }
}

// The weights of the four neighbours, the attention weight included.
template <typename T>
inline void weigh(const Plan<T>& plan, const T* __restrict attention, Samples<T>& samples) {
  const T* __restrict fractions_x = samples.fractions_x.data();
  const T* __restrict fractions_y = samples.fractions_y.data();
  T* __restrict corners = samples.corners.data();
  const int64_t count = plan.samples;
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) {
    const T lower = attention[n] * fractions_y[n], upper = attention[n] - lower;
    const T lower_right = lower * fractions_x[n], upper_right = upper * fractions_x[n];
    corners[n] = upper - upper_right;
    corners[count + n] = upper_right;
    corners[2 * count + n] = lower - lower_right;
    corners[3 * count + n] = lower_right;
  }
}

// output[q, d] = sum of weight * value over the samples and their neighbours.
template <typename T, int kWidth>
void forward(
    const Plan<T>& plan,
    const T* __restrict rows,
    const T* __restrict locations,
    const T* __restrict attention,
    int64_t queries,
    Samples<T>& samples,
    T* __restrict output) {
  const int64_t width = kWidth > 0 ? kWidth : plan.width;
  const int64_t count = plan.samples;
  Row<T, kWidth> sum(samples);
  for (int64_t q = 0; q < queries; ++q) {
    locate(plan, locations + q * plan.query_stride * 2, samples);
    weigh(plan, attention + q * plan.query_stride, samples);
    const T* __restrict corners = samples.corners.data();
    for (int64_t d = 0; d < width; ++d) {
      sum[d] = 0;
    }
    for (int64_t n = 0; n < count; ++n) {
      const T* __restrict upper = rows + samples.rows[n] * width;
      const T* __restrict lower = upper + samples.steps[n] * width;
      const T w0 = corners[n], w1 = corners[count + n], w2 = corners[2 * count + n], w3 = corners[3 * count + n];
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        sum[d] += w0 * upper[d] + w1 * upper[width + d] + w2 * lower[d] + w3 * lower[width + d];
      }
    }
    T* __restrict out = output + q * plan.row_stride;
    for (int64_t d = 0; d < plan.channels; ++d) {
      out[d] = sum[d];
    }
  }
}

// Gradients of locations and attention weights: for each sample, grad_output times the four neighbours.
template <typename T, int kWidth>
void backward_samples(
    const Plan<T>& plan,
    const T* __restrict rows,
    const T* __restrict locations,
    const T* __restrict attention,
    const T* __restrict grad_output,
    int64_t queries,
    Samples<T>& samples,
    T* __restrict grad_locations,
    T* __restrict grad_attention) {
  const int64_t width = kWidth > 0 ? kWidth : plan.width;
  const int64_t count = plan.samples;
  Row<T, kWidth> grad(samples);
  for (int64_t d = plan.channels; d < width; ++d) {
    grad[d] = 0;
  }
  T* __restrict dots = samples.corners.data();
  for (int64_t q = 0; q < queries; ++q) {
    locate(plan, locations + q * plan.query_stride * 2, samples);
    for (int64_t d = 0; d < plan.channels; ++d) {
      grad[d] = grad_output[q * plan.row_stride + d];
    }
    for (int64_t n = 0; n < count; ++n) {
      const T* __restrict upper = rows + samples.rows[n] * width;
      const T* __restrict lower = upper + samples.steps[n] * width;
      T dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
      for (int64_t d = 0; d < width; ++d) {
        dot0 += grad[d] * upper[d];
        dot1 += grad[d] * upper[width + d];
        dot2 += grad[d] * lower[d];
        dot3 += grad[d] * lower[width + d];
      }
      dots[n] = dot0;
      dots[count + n] = dot1;
      dots[2 * count + n] = dot2;
      dots[3 * count + n] = dot3;
    }
    const T* __restrict weights = attention + q * plan.query_stride;
    T* __restrict grad_weights = grad_attention + q * plan.query_stride;
    T* __restrict grad_xy = grad_locations + q * plan.query_stride * 2;
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) {
      const T x = samples.fractions_x[n], y = samples.fractions_y[n];
      const T upper = dots[count + n] - dots[n], lower = dots[3 * count + n] - dots[2 * count + n];
      const T left = dots[2 * count + n] - dots[n], right = dots[3 * count + n] - dots[count + n];
      const T along_x = upper + y * (lower - upper), along_y = left + x * (right - left);
      grad_weights[n] = dots[n] + x * upper + y * along_y;
      grad_xy[2 * n] = weights[n] * plan.widths[n] * along_x;
      grad_xy[2 * n + 1] = weights[n] * plan.heights[n] * along_y;
    }
  }
}

// grad_rows += weight * grad_output for the neighbours of every sample, for `kWidth` channels of the head.
template <typename T, int kWidth>
void backward_value(
    const Plan<T>& plan,
    const T* __restrict locations,
    const T* __restrict attention,
    const T* __restrict grad_output,
    int64_t channels, // that grad_output has, at most the width
    int64_t runtime_width,
    Samples<T>& samples,
    T* __restrict grad_rows) {
  const int64_t width = kWidth > 0 ? kWidth : runtime_width;
  const int64_t count = plan.samples;
  Row<T, kWidth> grad(samples);
  for (int64_t d = channels; d < width; ++d) {
    grad[d] = 0;
  }
  for (int64_t q = 0; q < plan.queries; ++q) {
    locate(plan, locations + q * plan.query_stride * 2, samples);
    weigh(plan, attention + q * plan.query_stride, samples);
    const T* __restrict corners = samples.corners.data();
    for (int64_t d = 0; d < channels; ++d) {
      grad[d] = grad_output[q * plan.row_stride + d];
    }
    for (int64_t n = 0; n < count; ++n) {
      T* upper = grad_rows + samples.rows[n] * width;
      T* lower = upper + samples.steps[n] * width;
      const T w0 = corners[n], w1 = corners[count + n], w2 = corners[2 * count + n], w3 = corners[3 * count + n];
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        upper[d] += w0 * grad[d];
        upper[width + d] += w1 * grad[d];
        lower[d] += w2 * grad[d];
        lower[width + d] += w3 * grad[d];
      }
    }
  }
}

} // namespace querymask::msda::QUERYMASK_ISA
