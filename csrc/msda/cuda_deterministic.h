// The gradient of value on CUDA, summed in a fixed order.
//
// A sample adds to its four neighbours. The cell that it lies in, between them, tells which those are: cells are numbered
// along the lines of the levels with a border of one around, for every image and head. The samples are sorted by cell,
// stably; a token's gradient then is the sum over the samples of the four cells around it, two side by side in each of
// two lines, which are two runs of the sorted list. A warp serves a token and head.

#pragma once

#include "cuda_sampling.h"

namespace querymask::msda {

// The cell of each sample, in the order of attention_weights, or their number for those without neighbours.
template <typename C>
__global__ void __launch_bounds__(kThreads) cell_kernel(
    const __grid_constant__ Geometry geometry,
    const C* __restrict__ locations,
    int* __restrict__ cell_of_sample) {
  const unsigned count = geometry.L * geometry.P;
  const unsigned sample = blockIdx.x * kThreads + threadIdx.x;
  if (sample >= geometry.B * geometry.Q * geometry.M * count) {
    return;
  }
  const Place<C> sampled = locate(geometry, locations + 2 * static_cast<int64_t>(sample), sample % count);
  const int64_t place = sample / count; // of query and head
  const int64_t pair = place / geometry.M / geometry.Q * geometry.M + place % geometry.M;
  const int64_t number = geometry.first_cell[sampled.level] +
      (sampled.line + 1) * (geometry.width[sampled.level] + 1) + sampled.column + 1;
  const int64_t all = geometry.first_cell[geometry.L];
  cell_of_sample[sample] = static_cast<int>(sampled.inside ? pair * all + number : geometry.B * geometry.M * all);
}

// order: numbers of the samples, sorted by cell; begins: where each cell begins in it, and after the last the end.
// geometry.group: threads of a token that share a sample; the others of the warp take other samples.
template <typename T, typename C, int kVector>
__global__ void __launch_bounds__(kThreads, 4) gather_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ grad_output,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    const int64_t* __restrict__ order,
    const int* __restrict__ begins,
    T* __restrict__ grad_value) {
  const int lane = threadIdx.x % 32, group = geometry.group;
  const int together = 32 / group, part = lane / group; // samples that the warp serves at once, and which of them this is
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= geometry.S) {
    return; // the whole warp
  }
  int level = 0;
  while (level + 1 < geometry.L && token >= geometry.token[level + 1]) {
    ++level;
  }
  const int width = geometry.width[level], pixel = static_cast<int>(token) - geometry.token[level];
  const int line = pixel / width, column = pixel % width;
  const unsigned count = geometry.L * geometry.P;

  for (int64_t pair = blockIdx.y; pair < geometry.B * geometry.M; pair += gridDim.y) {
    const int64_t image = pair / geometry.M, head = pair % geometry.M;
    for (int first = 0; first < geometry.D; first += group * kVector) { // once, unless a head is very wide
      const int channel = first + lane % group * kVector;
      const T* channels = opaque(grad_output + (channel < geometry.D ? channel : 0));
      C sum[kVector] = {};
      for (int upper = 1; upper >= 0; --upper) { // the cells above the token, then those below
        const int64_t left = pair * geometry.first_cell[geometry.L] + geometry.first_cell[level] +
            (line + 1 - upper) * (width + 1) + column;
        const int end = begins[left + 2];
        for (int begin = begins[left]; begin < end; begin += 32) {
          // Of the sample that this thread prepares for all: its weight, and where its query and head begin, in
          // vectors. Threads beyond the last one take that one, weighted by zero: no load depends on a condition.
          const unsigned sample = static_cast<unsigned>(order[min(begin + lane, end - 1)]);
          const unsigned my_place = sample / count * (geometry.D / kVector);
          const Place<C> sampled = locate(geometry, locations + 2 * static_cast<int64_t>(sample), sample % count);
          const C by_x = sampled.column == column ? C(1) - sampled.x : sampled.x;
          const C by_y = sampled.line == line ? C(1) - sampled.y : sampled.y;
          const C my_weight = begin + lane < end ? by_x * by_y * static_cast<C>(attention[sample]) : C(0);
          const int prepared = min(32, end - begin);
#pragma unroll 2
          for (int n = part; n < prepared + part; n += together) {
            const C weight = __shfl_sync(kWarp, my_weight, n);
            const unsigned place = __shfl_sync(kWarp, my_place, n);
            C grad[kVector];
            unpack(load<kVector>(channels + static_cast<uint64_t>(place) * kVector), grad);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              sum[i] += weight * grad[i];
            }
          }
        }
      }
      Vector<T, kVector> result;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        for (int distance = group; distance < 32; distance *= 2) {
          sum[i] += __shfl_xor_sync(kWarp, sum[i], distance);
        }
        result.values[i] = static_cast<T>(sum[i]);
      }
      if (lane < group && channel < geometry.D) {
        const int64_t row = (image * geometry.S + token) * geometry.M + head;
        *reinterpret_cast<Vector<T, kVector>*>(grad_value + row * geometry.D + channel) = result;
      }
    }
  }
}

} // namespace querymask::msda
