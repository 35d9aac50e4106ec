// The gradient of value on CUDA, summed within tiles of queries before it is added to memory.
//
// Atomic additions to memory bound this pass, one for each neighbour of each sample, and neighbouring queries have most
// of their neighbours in common. A block finds those: the tokens that its samples add to stand in a hash table in
// shared memory, each at the head of a list of weights and queries. Then some threads sum up each list, and add the sum.

#pragma once

#include "cuda_sampling.h"

namespace querymask::msda {

// What a sample adds to a token: its weight, times the output's gradient of its query.
template <typename C>
struct Share {
  C weight;
  short member; // of the tile
  short next; // share of the same token, or -1
};

constexpr int kMaxMembers = 64; // queries of a tile
constexpr int kShares = 4 * kThreads; // of one sample for each thread

// Adds to grad_value, which must be zero before; it is in C, so that float16 and bfloat16 are summed in float32.
// geometry.group: threads that serve a query, each with a sample at a time; at least kThreads / kMaxMembers.
template <typename T, typename C, int kVector>
__global__ void __launch_bounds__(kThreads, 4) joined_kernel(
    const __grid_constant__ Geometry geometry,
    const T* __restrict__ grad_output,
    const C* __restrict__ locations,
    const T* __restrict__ attention,
    C* __restrict__ grad_value) {
  constexpr int kLanes = 32 / kVector; // threads that serve a token, with 32 channels
  constexpr int kBits = sizeof(C) == 8 ? 10 : 11, kSlots = 1 << kBits; // of the table: no fewer than shares
  static_assert(kSlots >= kShares);
  __shared__ int tokens[kSlots]; // -1 where a slot is free
  __shared__ int heads[kSlots]; // first share of the slot's token, or -1
  __shared__ Share<C> shares[kShares];
  __shared__ short taken[kShares]; // slots that are not free
  __shared__ int counts[2]; // of those, this time and next time
  __shared__ Vector<C, kVector> grads[kMaxMembers][kLanes];

  const int group = geometry.group, members = kThreads / group;
  const int member = threadIdx.x / group, lane = threadIdx.x % group;
  const int64_t query = query_of(geometry, blockIdx.x, member, members);
  const int64_t row = static_cast<int64_t>(geometry.M) * geometry.D;
  const int count = geometry.L * geometry.P;
  const int part = threadIdx.x % kLanes; // of a token's channels
  for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
    tokens[slot] = heads[slot] = -1;
  }
  if (threadIdx.x < 2) {
    counts[threadIdx.x] = 0;
  }
  int turn = 0;

  for (int64_t pair = blockIdx.y; pair < geometry.B * geometry.M; pair += gridDim.y) {
    const int64_t image = pair / geometry.M, head = pair % geometry.M;
    const int64_t place = (image * geometry.Q + query) * geometry.M + head; // not used where query is -1
    for (int first = 0; first < geometry.D; first += 32) { // once, unless a head is wide
      const int channel = first + part * kVector;
      __syncthreads(); // everyone is done with the gradients before
      for (int i = threadIdx.x / kLanes; i < members; i += kThreads / kLanes) {
        const int64_t from = query_of(geometry, blockIdx.x, i, members);
        C grad[kVector] = {};
        if (from >= 0 && channel < geometry.D) {
          const int64_t output = (image * geometry.Q + from) * geometry.M + head;
          unpack(load<kVector>(grad_output + output * geometry.D + channel), grad);
        }
        memcpy(&grads[i][part], grad, sizeof(grad));
      }
      for (int begin = 0; begin < count; begin += group, turn ^= 1) {
        __syncthreads(); // gradients are there, and everyone is done with the lists before
        const int64_t index = place * count + begin + lane;
        Place<C> sampled{};
        if (query >= 0 && begin + lane < count) {
          sampled = locate(geometry, locations + 2 * index, begin + lane);
        }
        if (sampled.inside) {
          const auto sample = make_sample<C, int>(geometry, sampled, static_cast<C>(attention[index]), 1);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int token = sample.offsets[k], share = 4 * static_cast<int>(threadIdx.x) + k;
            unsigned slot = static_cast<unsigned>(token) * 2654435769u >> (32 - kBits);
            int before = atomicCAS(tokens + slot, -1, token);
            while (before != -1 && before != token) {
              slot = (slot + 1) % kSlots;
              before = atomicCAS(tokens + slot, -1, token);
            }
            if (before == -1) {
              taken[atomicAdd(counts + turn, 1)] = static_cast<short>(slot);
            }
            const int next = atomicExch(heads + slot, share);
            shares[share] = {sample.weights[k], static_cast<short>(member), static_cast<short>(next)};
          }
        }
        __syncthreads();
        const int found = counts[turn];
        if (threadIdx.x == 0) {
          counts[turn ^ 1] = 0;
        }
        constexpr int kTogether = kThreads / kLanes; // tokens
        for (int begin_token = 0; begin_token < found; begin_token += kTogether) {
          const int number = begin_token + static_cast<int>(threadIdx.x) / kLanes;
          const int slot = number < found ? taken[number] : -1;
          if (slot >= 0) {
            C sum[kVector] = {};
            for (int i = heads[slot]; i >= 0;) {
              const Share<C> share = shares[i];
              const Vector<C, kVector> grad = grads[share.member][part];
              i = share.next;
#pragma unroll
              for (int j = 0; j < kVector; ++j) {
                sum[j] += share.weight * grad.values[j];
              }
            }
            if (channel < geometry.D) {
              const int64_t token = image * geometry.S + tokens[slot];
              add<C, kVector>(grad_value + token * row + head * geometry.D + channel, sum);
            }
          }
          __syncwarp(kWarp); // all threads of the token have read its slot
          if (slot >= 0 && part == 0) {
            tokens[slot] = heads[slot] = -1;
          }
        }
      }
    }
  }
}

} // namespace querymask::msda
