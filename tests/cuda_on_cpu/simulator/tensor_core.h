// Stands in for csrc/tensor_core.h, whose comments tell what each function does and which lane has which elements.

#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "device.h"

namespace querymask {

inline void copy_async_16(void* shared, const void* global, bool wanted) {
  ::simulated::start_copy(shared, global, 16, wanted);
}
inline void copy_async_16_cached(void* shared, const void* global, bool wanted) {
  ::simulated::start_copy(shared, global, 16, wanted);
}
inline void copy_async_commit() {
  ::simulated::commit_copies();
}
template <int kPending>
void copy_async_wait() {
  ::simulated::wait_for_copies(kPending);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000) & ~0x1fffu : bits;
}

namespace simulated_mma {

// What a lane brings to a multiplication, or to loading matrices.
struct Fragments {
  float* d;
  const uint32_t *a, *b;
};
struct Rows {
  uint32_t* registers;
  const uint16_t* row;
};

inline void require_whole_warp(const char* name, unsigned present) {
  if (present != ~0u) {
    ::simulated::finding(std::string(name) + " without all lanes of a warp");
  }
}

inline float tf32_element(uint32_t bits) {
  return std::bit_cast<float>(bits & ~0x1fffu); // the hardware reads no more
}
template <typename T>
float half_element(const uint32_t* registers, int index) { // two in a register
  return static_cast<float>(T(static_cast<uint16_t>(registers[index / 2] >> index % 2 * 16), T::from_bits()));
}

// Adds A (16 x kInner) times B (kInner x 8) to D, where a_at(lane's registers, i) and b_at are a lane's elements and
// kPart of them are neighbours in a row.
template <int kInner, int kPart, float (*kElement)(const uint32_t*, int)>
void multiply(void* const (&lanes)[32], unsigned present) {
  require_whole_warp("mma", present);
  if (present != ~0u) {
    return;
  }
  float a[16][kInner], b[kInner][8];
  constexpr int kWide = 4 * kPart; // columns of A that the registers of one number hold
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(lanes[lane]);
    const int row = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4 * kPart; ++i) { // register i / kPart: rows below for odd ones, columns beyond for the last two
      const int number = i / kPart;
      a[row + number % 2 * 8][number / 2 * kWide + pair * kPart + i % kPart] = kElement(mine.a, i);
    }
    for (int i = 0; i < 2 * kPart; ++i) {
      b[i / kPart * kWide + pair * kPart + i % kPart][row] = kElement(mine.b, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = mine.d[i];
      for (int k = 0; k < kInner; ++k) {
        sum += static_cast<double>(a[row][k]) * b[k][column];
      }
      mine.d[i] = static_cast<float>(sum);
    }
  }
}

inline float tf32_at(const uint32_t* registers, int index) {
  return tf32_element(registers[index]);
}

template <bool kTransposed>
void load_matrices(void* const (&lanes)[32], unsigned present) {
  require_whole_warp("ldmatrix", present);
  if (present != ~0u) {
    return;
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      uint32_t pair = 0;
      for (int k = 0; k < 2; ++k) {
        const int row = kTransposed ? lane % 4 * 2 + k : lane / 4;
        const int column = kTransposed ? lane / 4 : lane % 4 * 2 + k;
        pair |= uint32_t(static_cast<const Rows*>(lanes[8 * i + row])->row[column]) << 16 * k;
      }
      static_cast<const Rows*>(lanes[lane])->registers[i] = pair;
    }
  }
}

inline void load(uint32_t (&r)[4], const void* shared, ::simulated::Combine combine, int line) {
  if (!::simulated::is_shared(shared, 16) || reinterpret_cast<uintptr_t>(shared) % 16 != 0) {
    ::simulated::fail_kernel(cudaErrorLaunchFailure, "ldmatrix of a row that is not shared memory or not aligned");
  }
  ::simulated::note_access(shared, 16, ::simulated::Access::kRead, __builtin_return_address(0));
  Rows rows{r, static_cast<const uint16_t*>(shared)};
  ::simulated::warp_collective("ldmatrix", ~0u, &rows, combine, line);
}

} // namespace simulated_mma

inline void mma_m16n8k8_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  simulated_mma::Fragments fragments{d, a, b};
  ::simulated::warp_collective("mma", ~0u, &fragments, simulated_mma::multiply<8, 1, simulated_mma::tf32_at>, line);
}
inline void mma_m16n8k16_half(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  simulated_mma::Fragments fragments{d, a, b};
  ::simulated::warp_collective(
      "mma", ~0u, &fragments, simulated_mma::multiply<16, 2, simulated_mma::half_element<c10::Half>>, line);
}
inline void mma_m16n8k16_bfloat16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  simulated_mma::Fragments fragments{d, a, b};
  ::simulated::warp_collective(
      "mma", ~0u, &fragments, simulated_mma::multiply<16, 2, simulated_mma::half_element<c10::BFloat16>>, line);
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* shared, int line = __builtin_LINE()) {
  simulated_mma::load(r, shared, simulated_mma::load_matrices<false>, line);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared, int line = __builtin_LINE()) {
  simulated_mma::load(r, shared, simulated_mma::load_matrices<true>, line);
}

} // namespace querymask
