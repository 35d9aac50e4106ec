// The gradients of locations and weights of multi-scale deformable attention on CUDA.

#pragma once

#include "cuda_sampling.h"

namespace querymask::msda {

// kGroup: geometry.group as a constant, or 0. Offset: wide enough for the elements of an image.
template <typename T, typename C, typename Offset, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads, kGroup > 0 ? 4 : 1) backward_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ grad_output,
    const T* __restrict__ value,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    C* __restrict__ grad_locations,
    C* __restrict__ grad_attention) {
  // Samples of a group that are served before their sums are added up.
  constexpr int kBatch = kGroup > 8 ? 8 : kGroup > 0 ? kGroup : 16 / sizeof(C);
  // One sample more for each group than it needs, so that groups lie in different banks.
  __shared__ Sample<C, Offset> shared_samples[kGroup > 0 ? kThreads / kGroup * (kBatch + 1) : 2 * kThreads];
  // Products of the output's gradient with the four neighbours, summed over the channels of one thread. The thread that
  // prepared a sample adds up those of its group: fewer instructions than shuffles.
  __shared__ Vector<C, 4> shared_products[kThreads * kBatch];
  const int group = kGroup > 0 ? kGroup : geometry.group;
  const int batch = min(group, kBatch);
  const int member = threadIdx.x / group, lane = threadIdx.x % group;
  Sample<C, Offset>* samples = shared_samples + member * (batch + 1);
  Vector<C, 4>* products = shared_products + member * batch * group;
  const int64_t query = query_of(geometry, blockIdx.x, member, kThreads / group);
  const int64_t row = static_cast<int64_t>(geometry.M) * geometry.D;
  const int count = geometry.L * geometry.P;

  for (int64_t pair = blockIdx.y; pair < geometry.B * geometry.M; pair += gridDim.y) {
    const int64_t image = pair / geometry.M, head = pair % geometry.M;
    const int64_t place = (image * geometry.Q + query) * geometry.M + head; // not used where query is -1
    for (int first = 0; first < geometry.D; first += group * kVector) { // once, unless a head is very wide
      const int channel = first + lane * kVector;
      const bool wanted = query >= 0 && channel < geometry.D;
      const T* channels = opaque(value + image * geometry.S * row + head * geometry.D + channel);
      C grad[kVector] = {};
      if (wanted) {
        unpack(load<kVector>(grad_output + place * geometry.D + channel), grad);
      }
      C zero = C(0); // the product with a neighbour outside: NaN where the output's gradient is not finite
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        zero += C(0) * grad[i];
      }
      for (int distance = group / 2; distance > 0; distance /= 2) {
        zero += __shfl_xor_sync(kWarp, zero, distance);
      }
      for (int begin = 0; begin < count; begin += batch) {
        const int64_t index = place * count + begin + lane;
        const bool prepares = query >= 0 && lane < batch && begin + lane < count;
        Place<C> sampled{};
        C weight = C(0);
        if (prepares) {
          sampled = locate(geometry, locations + 2 * index, begin + lane);
          weight = static_cast<C>(attention[index]);
        }
        const Turns turns = take_turns(sampled.inside, lane, group);
        __syncwarp(kWarp); // everyone is done with the samples and products before
        if (sampled.inside) {
          samples[turns.mine] = make_sample(geometry, sampled, weight, static_cast<Offset>(row));
        }
        __syncwarp(kWarp);
        for (int n = 0; n < turns.count; ++n) {
          const Sample<C, Offset> sample = samples[n];
          Vector<C, 4> dots{};
          if (wanted) {
            Vector<T, kVector> corners[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) { // all loads first
              corners[k] = load<kVector>(channels + sample.offsets[k]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              C numbers[kVector];
              unpack(corners[k], numbers);
#pragma unroll
              for (int i = 0; i < kVector; ++i) {
                dots.values[k] += grad[i] * numbers[i];
              }
            }
          }
          products[n * group + lane] = dots;
        }
        __syncwarp(kWarp);
        if (prepares) {
          C dots[4] = {zero, zero, zero, zero};
          if (sampled.inside) {
            Vector<C, 4> sum{};
            for (int i = 0; i < group; ++i) { // threads begin with different ones, which lie in different banks
              const Vector<C, 4> part = products[turns.mine * group + (lane + i) % group];
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                sum.values[k] += part.values[k];
              }
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const bool inside = (k & 1 ? sampled.right(geometry) : sampled.left()) &&
                  (k & 2 ? sampled.lower(geometry) : sampled.upper());
              dots[k] = inside ? sum.values[k] : zero;
            }
          }
          const C to_right = dots[1] - dots[0], to_right_below = dots[3] - dots[2], to_lower = dots[2] - dots[0];
          const C both = to_right_below - to_right;
          const C by_x = to_right + sampled.y * both, by_y = to_lower + sampled.x * both;
          Vector<C, 2> location{
              by_x * weight * static_cast<C>(geometry.width[sampled.level]),
              by_y * weight * static_cast<C>(geometry.height[sampled.level])};
          C by_attention = dots[0] + sampled.x * to_right + sampled.y * by_y;
          auto* target = reinterpret_cast<Vector<C, 2>*>(grad_locations + 2 * index);
          if (first > 0) { // this thread has written the part of other channels
            by_attention += grad_attention[index];
            location.values[0] += target->values[0];
            location.values[1] += target->values[1];
          }
          grad_attention[index] = by_attention;
          *target = location;
        }
      }
    }
  }
}

} // namespace querymask::msda
