// The forward kernel of multi-scale deformable attention on CUDA.

#pragma once

#include "cuda_sampling.h"

namespace querymask::msda {

// kGroup: geometry.group as a constant, or 0. Offset: wide enough for the elements of an image. At least 4 blocks of a
// multiprocessor: 64 registers, which nvcc would otherwise go below and spill.
template <typename T, typename C, typename Offset, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads, kGroup > 0 ? 4 : 1) forward_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ value,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    T* __restrict__ output) {
  // One sample more for each group than it has threads, so that groups lie in different banks.
  __shared__ Sample<C, Offset> shared[kGroup > 0 ? kThreads / kGroup * (kGroup + 1) : 2 * kThreads];
  const int group = kGroup > 0 ? kGroup : geometry.group;
  const int member = threadIdx.x / group, lane = threadIdx.x % group;
  Sample<C, Offset>* samples = shared + member * (group + 1);
  const int64_t query = query_of(geometry, blockIdx.x, member, kThreads / group);
  const int64_t row = static_cast<int64_t>(geometry.M) * geometry.D;
  const int count = geometry.L * geometry.P;

  for (int64_t pair = blockIdx.y; pair < geometry.B * geometry.M; pair += gridDim.y) {
    const int64_t image = pair / geometry.M, head = pair % geometry.M;
    const int64_t place = (image * geometry.Q + query) * geometry.M + head; // not used where query is -1
    for (int first = 0; first < geometry.D; first += group * kVector) { // once, unless a head is very wide
      const int channel = first + lane * kVector;
      const T* channels = opaque(value + image * geometry.S * row + head * geometry.D + channel);
      C sum[kVector] = {};
      for (int begin = 0; begin < count; begin += group) {
        const int64_t index = place * count + begin + lane;
        Place<C> sampled{};
        C weight = C(0);
        if (query >= 0 && begin + lane < count) {
          sampled = locate(geometry, locations + 2 * index, begin + lane);
          weight = static_cast<C>(attention[index]);
        }
        const bool counts = sampled.inside || weight * C(0) != C(0); // NaN and infinite weights of zeros do, too
        const Turns turns = take_turns(counts, lane, group);
        __syncwarp(kWarp); // everyone is done with the samples before
        if (counts) {
          samples[turns.mine] = make_sample(geometry, sampled, weight, static_cast<Offset>(row));
        }
        __syncwarp(kWarp);
        if (channel >= geometry.D) {
          continue;
        }
#pragma unroll 2
        for (int n = 0; n < turns.count; ++n) {
          const Sample<C, Offset> sample = samples[n];
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
              sum[i] += sample.weights[k] * numbers[i];
            }
          }
        }
      }
      if (query >= 0 && channel < geometry.D) {
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

} // namespace querymask::msda
