// Multi-scale deformable attention in the scheme that is usual since 2020, for comparison: a thread computes one channel
// of one query and head, with loads of one float, and finds the coordinates of all samples by itself. In the backward
// pass a block serves one query and head; every thread adds to the gradient of `value` with one atomic a neighbour, and
// the first thread sums the channels' shares of the other gradients one after the other.
//
// Plain C functions on device pointers, called through ctypes: compiled without PyTorch's headers, in seconds.

#include <cuda_runtime.h>

// Not in the unnamed namespace: a function with such a parameter would not be visible in the library.
constexpr int kMaxLevels = 8;

struct Sizes {
  int batch, tokens, heads, channels, queries, levels, points;
  int height[kMaxLevels], width[kMaxLevels];
};

namespace {

// The four neighbours of a location, and how much of each is taken.
struct Neighbours {
  int top, left, height, width;
  float y, x; // distances from the upper left one

  __device__ Neighbours(float location_x, float location_y, int level_height, int level_width)
      : height(level_height), width(level_width) {
    const float pixel_y = location_y * height - 0.5f, pixel_x = location_x * width - 0.5f;
    const float upper = floorf(pixel_y), left_side = floorf(pixel_x);
    top = static_cast<int>(upper);
    left = static_cast<int>(left_side);
    y = pixel_y - upper;
    x = pixel_x - left_side;
  }
  __device__ bool inside(int corner) const {
    const int row = top + corner / 2, column = left + corner % 2;
    return row >= 0 && row < height && column >= 0 && column < width;
  }
  __device__ int token(int corner) const {
    return (top + corner / 2) * width + left + corner % 2;
  }
  __device__ float weight(int corner) const {
    return (corner / 2 ? y : 1 - y) * (corner % 2 ? x : 1 - x);
  }
  // Derivatives of `weight` by the pixel's coordinates.
  __device__ float by_y(int corner) const {
    return (corner / 2 ? 1 : -1) * (corner % 2 ? x : 1 - x);
  }
  __device__ float by_x(int corner) const {
    return (corner % 2 ? 1 : -1) * (corner / 2 ? y : 1 - y);
  }
};

__global__ void forward_kernel(
    Sizes sizes,
    const float* value,
    const float* locations,
    const float* weights,
    float* output,
    long long elements) {
  const long long element = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= elements) {
    return;
  }
  const int channel = element % sizes.channels;
  const long long query_head = element / sizes.channels; // of batch, query and head
  const int head = query_head % sizes.heads;
  const long long image = query_head / sizes.heads / sizes.queries;
  const long long stride = static_cast<long long>(sizes.heads) * sizes.channels; // of tokens
  const float* map = value + image * sizes.tokens * stride + head * sizes.channels + channel;
  long long sample = query_head * sizes.levels * sizes.points;
  float sum = 0;
  for (int level = 0; level < sizes.levels; ++level) {
    for (int point = 0; point < sizes.points; ++point, ++sample) {
      const Neighbours found(locations[2 * sample], locations[2 * sample + 1], sizes.height[level], sizes.width[level]);
      float sampled = 0;
      for (int corner = 0; corner < 4; ++corner) {
        if (found.inside(corner)) {
          sampled += found.weight(corner) * map[found.token(corner) * stride];
        }
      }
      sum += weights[sample] * sampled;
    }
    map += static_cast<long long>(sizes.height[level]) * sizes.width[level] * stride;
  }
  output[element] = sum;
}

__global__ void backward_kernel(
    Sizes sizes,
    const float* grad_output,
    const float* value,
    const float* locations,
    const float* weights,
    float* grad_value,
    float* grad_locations,
    float* grad_weights) {
  extern __shared__ float shares[]; // three for each channel: by x, y and the weight
  const int channel = threadIdx.x;
  const long long query_head = blockIdx.x;
  const int head = query_head % sizes.heads;
  const long long image = query_head / sizes.heads / sizes.queries;
  const long long stride = static_cast<long long>(sizes.heads) * sizes.channels;
  long long place = image * sizes.tokens * stride + head * sizes.channels + channel;
  const float grad = grad_output[query_head * sizes.channels + channel];
  long long sample = query_head * sizes.levels * sizes.points;
  for (int level = 0; level < sizes.levels; ++level) {
    const int height = sizes.height[level], width = sizes.width[level];
    for (int point = 0; point < sizes.points; ++point, ++sample) {
      const Neighbours found(locations[2 * sample], locations[2 * sample + 1], height, width);
      const float weight = weights[sample];
      float by_x = 0, by_y = 0, sampled = 0;
      for (int corner = 0; corner < 4; ++corner) {
        if (found.inside(corner)) {
          const long long at = place + found.token(corner) * stride;
          sampled += found.weight(corner) * value[at];
          by_x += found.by_x(corner) * value[at];
          by_y += found.by_y(corner) * value[at];
          atomicAdd(grad_value + at, found.weight(corner) * weight * grad);
        }
      }
      shares[3 * channel] = by_x * width * weight * grad;
      shares[3 * channel + 1] = by_y * height * weight * grad;
      shares[3 * channel + 2] = sampled * grad;
      __syncthreads();
      if (channel == 0) {
        float sum_x = 0, sum_y = 0, sum_weight = 0;
        for (int other = 0; other < sizes.channels; ++other) {
          sum_x += shares[3 * other];
          sum_y += shares[3 * other + 1];
          sum_weight += shares[3 * other + 2];
        }
        grad_locations[2 * sample] = sum_x;
        grad_locations[2 * sample + 1] = sum_y;
        grad_weights[sample] = sum_weight;
      }
      __syncthreads();
    }
    place += static_cast<long long>(height) * width * stride;
  }
}

} // namespace

extern "C" int per_channel_forward(
    const Sizes* sizes,
    const float* value,
    const float* locations,
    const float* weights,
    float* output,
    cudaStream_t stream) {
  constexpr int kThreads = 512;
  const long long elements = static_cast<long long>(sizes->batch) * sizes->queries * sizes->heads * sizes->channels;
  const unsigned blocks = static_cast<unsigned>((elements + kThreads - 1) / kThreads);
  forward_kernel<<<blocks, kThreads, 0, stream>>>(*sizes, value, locations, weights, output, elements);
  return cudaGetLastError();
}

// The gradient of `value` is added to what is there.
extern "C" int per_channel_backward(
    const Sizes* sizes,
    const float* grad_output,
    const float* value,
    const float* locations,
    const float* weights,
    float* grad_value,
    float* grad_locations,
    float* grad_weights,
    cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(sizes->batch) * sizes->queries * sizes->heads;
  backward_kernel<<<blocks, sizes->channels, 3 * sizes->channels * sizeof(float), stream>>>(
      *sizes, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights);
  return cudaGetLastError();
}
