// Tensor cores and asynchronous copies, as thin as PTX allows. For nvcc only, and sm_80 or later: a kernel that calls
// these has no body for earlier architectures.
//
// Fragments of a lane, with row = lane / 4 and pair = lane % 4, as in the PTX ISA (mma.m16n8k8, mma.m16n8k16):
//   d[0], d[1] are D[row][2 * pair] and D[row][2 * pair + 1]; d[2], d[3] the same of D[row + 8].
//   TF32: a[0..3] are A[row][pair], A[row + 8][pair], A[row][pair + 4], A[row + 8][pair + 4]; b[0], b[1] are
//     B[pair][row], B[pair + 4][row].
//   16 bits, two in a register, the lower first: a[0..3] start at A[row][2 * pair], A[row + 8][2 * pair],
//     A[row][2 * pair + 8], A[row + 8][2 * pair + 8]; b[0], b[1] at B[2 * pair][row], B[2 * pair + 8][row].

#pragma once

#include <cstdint>

namespace querymask {

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes from global to shared memory, both aligned; zeros, and no read, where it is not wanted. It
// is there for this thread after copy_async_wait, for others after a barrier behind that. It goes past the L1 cache.
__device__ inline void copy_async_16(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// The same, through the L1 cache: for what the block reads again.
__device__ inline void copy_async_16_cached(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that this thread has started since the last group.
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until no more than the kPending latest groups of this thread are under way.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Rounded to TF32's 10 bits, to nearest, ties away from zero.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

// d += a * b by all threads of a warp, summed in float32.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 16-bit elements: lane 8 * i + j gives the address of row j (16 bytes, aligned) of matrix i,
// and r[i] becomes the pair of elements from 2 * (lane % 4) on of row lane / 4 of matrix i. Called by a whole warp.
__device__ inline void load_matrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same of the transposed matrices: r[i] has rows 2 * (lane % 4) and the next of column lane / 4.
__device__ inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

} // namespace querymask
