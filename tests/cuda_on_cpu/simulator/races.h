// Finds accesses to the same memory, at least one of them a write that is not atomic, that no barrier orders.

#pragma once

#include <cstddef>
#include <cstdint>

namespace simulated {

enum class Access { kRead, kWrite, kAtomic };

// Called by the scheduler, whether or not the kernels report their accesses.
void races_begin_block(uint64_t block); // of a launch
void races_join_block(); // a barrier of the block
void races_join_warp(unsigned warp, unsigned lanes); // __syncwarp
void races_forget(const void* address, size_t size); // memory that is freed
void races_forget_all(); // a launch has ended

// Called where the running thread touches memory; `code` is the address of the instruction.
void note_access(const void* address, size_t size, Access access, const void* code);

// Who runs: set by the scheduler before a thread goes on. Not a thread: a host access.
struct RunningThread {
  bool exists;
  unsigned warp, lane;
};
extern RunningThread running_thread;
extern const char* stacks_begin;
extern const char* stacks_end; // of fibers: never shared between threads

} // namespace simulated
