// The part of CUDA C++ that the kernels use, for g++. Included before everything else of a translated source.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <c10/macros/Macros.h>

#include "races.h"
#include "scheduler.h"

#define __global__
#ifdef __SANITIZE_THREAD__
// Inlined as on the GPU: g++ reports no writes of a function to the object that it returns, which may be in shared memory.
#define __device__ __attribute__((always_inline))
#else
#define __device__
#endif
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::simulated::thread_index)
#define blockIdx (::simulated::block_index)
#define blockDim (::simulated::block_size)
#define gridDim (::simulated::grid_size)
constexpr int warpSize = 32;

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition)                                                                   \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      ::simulated::fail_kernel(cudaErrorAssert, "device-side assert triggered: " #condition);            \
    }                                                                                                   \
  } while (false)

// Vectors of numbers.

#define SIMULATED_VECTORS(name, type)                                             \
  struct alignas(2 * sizeof(type)) name##2 {                                      \
    type x, y;                                                                    \
  };                                                                              \
  struct alignas(std::min<size_t>(4 * sizeof(type), 16)) name##4 {                \
    type x, y, z, w;                                                              \
  };                                                                              \
  inline name##2 make_##name##2(type x, type y) {                                 \
    return {x, y};                                                                \
  }                                                                               \
  inline name##4 make_##name##4(type x, type y, type z, type w) {                 \
    return {x, y, z, w};                                                          \
  }
SIMULATED_VECTORS(short, short)
SIMULATED_VECTORS(ushort, unsigned short)
SIMULATED_VECTORS(int, int)
SIMULATED_VECTORS(uint, unsigned)
SIMULATED_VECTORS(float, float)
SIMULATED_VECTORS(double, double)
#undef SIMULATED_VECTORS

// Arithmetic.

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}
inline float __saturatef(float value) {
  return value > 0 ? std::min(value, 1.0f) : 0.0f; // 0 for NaN
}
inline int __float2int_rd(float value) { // as the GPU: saturated, 0 for NaN
  const double rounded = std::floor(static_cast<double>(value));
  return value != value ? 0 : static_cast<int>(std::clamp<double>(rounded, INT32_MIN, INT32_MAX));
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return std::countl_zero(static_cast<unsigned>(bits));
}
inline unsigned __brev(unsigned bits) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    result |= (bits >> i & 1) << (31 - i);
  }
  return result;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> 4 * i & 15;
    const unsigned byte = bytes >> 8 * (selector & 7) & 0xff;
    result |= (selector & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t(a) * b >> 32);
}

// Memory.

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomics. Not inlined into kernels, whose accesses are reported as ordinary ones.
float atomicAdd(float* address, float value);
double atomicAdd(double* address, double value);
int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value);
float2 atomicAdd(float2* address, float2 value); // each component is atomic, not the whole; sm_90
float4 atomicAdd(float4* address, float4 value);
int atomicMax(int* address, int value);
unsigned atomicMax(unsigned* address, unsigned value);
int atomicMin(int* address, int value);
int atomicExch(int* address, int value);
unsigned atomicExch(unsigned* address, unsigned value);
int atomicCAS(int* address, int expected, int value);
unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected, unsigned long long value);
unsigned atomicOr(unsigned* address, unsigned value);

// Barriers and collectives.

inline void __syncthreads(int line = __builtin_LINE()) {
  ::simulated::block_barrier(false, line);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return ::simulated::block_barrier(predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return ::simulated::block_barrier(predicate != 0, line) > 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return ::simulated::block_barrier(predicate == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  ::simulated::warp_collective("__syncwarp", mask, nullptr, nullptr, line);
}

namespace simulated {

// What a lane brings to a shuffle, and takes from it.
template <typename T>
struct Shuffled {
  T value, result;
  int source; // lane; its own for none
};

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "only registers are shuffled");
  Shuffled<T> data{value, value, source};
  warp_collective(
      name, mask, &data,
      [](void* const(&lanes)[32], unsigned present) {
        for (unsigned i = 0; i < 32; ++i) {
          if (present >> i & 1) {
            Shuffled<T>& mine = *static_cast<Shuffled<T>*>(lanes[i]);
            if (present >> mine.source & 1) {
              mine.result = static_cast<const Shuffled<T>*>(lanes[mine.source])->value;
            } else {
              finding("a shuffle reads a lane that does not take part");
            }
          }
        }
      },
      line);
  return data.result;
}

// The first lane of the part of the warp, `width` wide, in which the running lane is.
inline int first_lane(int width) {
  return static_cast<int>(lane()) / width * width;
}

struct Voted {
  uint64_t value;
  unsigned result;
};

inline unsigned vote(const char* name, unsigned mask, uint64_t value, Combine combine, int line) {
  Voted data{value, 0};
  warp_collective(name, mask, &data, combine, line);
  return data.result;
}

// For each lane the lanes with its value.
inline void match(void* const (&lanes)[32], unsigned present) {
  for (unsigned i = 0; i < 32; ++i) {
    for (unsigned k = 0; k < 32; ++k) {
      if (present >> i & present >> k & 1) {
        Voted& mine = *static_cast<Voted*>(lanes[i]);
        mine.result |= unsigned(mine.value == static_cast<const Voted*>(lanes[k])->value) << k;
      }
    }
  }
}

// For each lane the lanes whose value is not zero.
inline void ballot(void* const (&lanes)[32], unsigned present) {
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (present >> i & 1) {
      result |= unsigned(static_cast<const Voted*>(lanes[i])->value != 0) << i;
    }
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (present >> i & 1) {
      static_cast<Voted*>(lanes[i])->result = result;
    }
  }
}

template <unsigned (*kReduce)(unsigned, unsigned)>
void reduce(void* const (&lanes)[32], unsigned present) {
  bool first = true;
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (present >> i & 1) {
      const unsigned value = static_cast<unsigned>(static_cast<const Voted*>(lanes[i])->value);
      result = first ? value : kReduce(result, value);
      first = false;
    }
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (present >> i & 1) {
      static_cast<Voted*>(lanes[i])->result = result;
    }
  }
}
inline unsigned sum_of(unsigned a, unsigned b) {
  return a + b;
}
inline unsigned least_of(unsigned a, unsigned b) {
  return std::min(a, b);
}
inline unsigned most_of(unsigned a, unsigned b) {
  return std::max(a, b);
}
inline unsigned all_bits_of(unsigned a, unsigned b) {
  return a & b;
}
inline unsigned any_bits_of(unsigned a, unsigned b) {
  return a | b;
}

} // namespace simulated

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  return ::simulated::shuffle(
      "__shfl_sync", mask, value, ::simulated::first_lane(width) + (source & (width - 1)), line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int mine = ::simulated::lane(), source = mine ^ bits;
  const bool within = source < ::simulated::first_lane(width) + width;
  return ::simulated::shuffle("__shfl_xor_sync", mask, value, within ? source : mine, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int mine = ::simulated::lane(), source = mine + static_cast<int>(delta);
  const bool within = source < ::simulated::first_lane(width) + width;
  return ::simulated::shuffle("__shfl_down_sync", mask, value, within ? source : mine, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int mine = ::simulated::lane(), source = mine - static_cast<int>(delta);
  const bool within = source >= ::simulated::first_lane(width);
  return ::simulated::shuffle("__shfl_up_sync", mask, value, within ? source : mine, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return ::simulated::vote("__ballot_sync", mask, predicate != 0, ::simulated::ballot, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return ::simulated::vote("__match_any_sync", mask, bits, ::simulated::match, line);
}
inline unsigned __activemask() = delete; // says nothing that a kernel may rely on

#define SIMULATED_REDUCTION(name, function)                                                                      \
  inline unsigned name(unsigned mask, unsigned value, int line = __builtin_LINE()) {                             \
    return ::simulated::vote(#name, mask, value, ::simulated::reduce<::simulated::function>, line);              \
  }
SIMULATED_REDUCTION(__reduce_add_sync, sum_of)
SIMULATED_REDUCTION(__reduce_min_sync, least_of)
SIMULATED_REDUCTION(__reduce_max_sync, most_of)
SIMULATED_REDUCTION(__reduce_and_sync, all_bits_of)
SIMULATED_REDUCTION(__reduce_or_sync, any_bits_of)
#undef SIMULATED_REDUCTION

// The runtime.

inline cudaError_t cudaGetLastError() {
  return ::simulated::take_last_error();
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout };
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
      ? ::simulated::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), value)
      : cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion; // the architecture that the kernel was compiled for, times 10
};
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  attributes->ptxVersion = SIMULATED_ARCH / 10;
  return cudaSuccess;
}
