// Runs the threads of a kernel's blocks on the CPU. A thread is a fiber: it runs until it ends or waits for others, in
// a barrier of its block or in a collective of its warp. Only kernels' code and the host's run in between, on one CPU
// thread, so nothing here is locked.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorAssert = 710,
  cudaErrorLaunchFailure = 719,
};

namespace simulated {

// Of the thread that runs.
extern dim3 thread_index, block_index, block_size, grid_size;

// Notes something that a GPU would leave undefined, or do without a message. The tests fail where there is any.
void finding(const std::string& text);

// Ends the kernel with an error, from within a thread.
[[noreturn]] void fail_kernel(cudaError_t error, const std::string& text);

struct Launch {
  const char* kernel;
  const void* function;
  int line;
  dim3 grid, block;
  size_t dynamic_shared; // bytes
  cudaStream_t stream;
};
void run(const Launch& launch, size_t parameter_bytes, const std::function<void()>& thread);

// What translated launches call: launcher(kernel, ..., grid, block, shared memory, stream)(arguments).
template <typename... P>
auto launcher(
    void (*kernel)(P...),
    const char* name,
    int line,
    dim3 grid,
    dim3 block,
    size_t dynamic_shared = 0,
    cudaStream_t stream = nullptr) {
  const Launch launch{name, reinterpret_cast<const void*>(kernel), line, grid, block, dynamic_shared, stream};
  return [=](std::type_identity_t<P>... arguments) {
    run(launch, (sizeof(P) + ... + 0), [&] { kernel(arguments...); });
  };
}

// Memory of the running block for the variable `key`, not a number where nothing was written. It is aligned as said and
// no better.
void* shared_variable(int key, size_t size, size_t alignment);
void* dynamic_shared(size_t alignment);
bool is_shared(const void* address, size_t size); // wholly within one such variable

// Waits for all threads of the block that have not ended. Returns for how many `predicate` held.
int block_barrier(bool predicate, int line);

// Waits for the lanes of `mask` that have not ended. The last to come calls combine(data, present): data[i] is what lane
// i brought, and present the lanes that take part.
using Combine = void (*)(void* const (&data)[32], unsigned present);
void warp_collective(const char* name, unsigned mask, void* data, Combine combine, int line);
unsigned lane(); // of the thread that runs

// An asynchronous copy to shared memory, zeros where it is not wanted, and the groups of them.
void start_copy(void* shared, const void* global, size_t size, bool wanted);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// Device guards, the current stream and errors, as the stand-ins of the runtime's headers report them.
void enter_device_guard();
void leave_device_guard();
cudaStream_t current_stream();
cudaError_t take_last_error();
const std::string& error_text();
cudaError_t allow_dynamic_shared(const void* function, int bytes);

constexpr size_t kSharedDefault = 48 << 10, kSharedMost = 227 << 10; // bytes of a block

} // namespace simulated
