#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "races.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulated {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr size_t kMaxParameters = 4096; // bytes

struct Context { // where a fiber or the scheduler goes on
  void* stack;
  void* code;
};

// Saves the present context in `from` and goes on with `to`. All registers count as changed, so the compiler saves those
// that it needs. noipa: other fibers change variables that this function, seen alone, does not.
__attribute__((noipa, no_sanitize("address"))) void switch_context(Context* from, const Context* to) {
  asm volatile("leaq -128(%%rsp), %%rsp\n\t" // beyond the red zone
               "pushq %%rbp\n\t"
               "leaq 1f(%%rip), %%rax\n\t"
               "movq %%rax, 8(%%rdi)\n\t"
               "movq %%rsp, 0(%%rdi)\n\t"
               "movq 0(%%rsi), %%rsp\n\t"
               "jmpq *8(%%rsi)\n"
               "1:\n\t"
               "popq %%rbp\n\t"
               "leaq 128(%%rsp), %%rsp"
               : "+D"(from), "+S"(to)
               :
               : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
                 "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
                 "xmm15", "memory", "cc");
}

struct Copy {
  void* shared;
  const void* global; // nullptr: zeros
  size_t size;
};

enum class Waits { kNot, kForWarp, kForBlock };

struct Fiber {
  Context context;
  char* stack;
  void* fake_stack; // of the address sanitizer
  Waits waits;
  // What it waits for.
  const char* collective;
  Combine combine;
  unsigned mask;
  void* data;
  int line;
  // Its asynchronous copies: the groups, and those since the last group.
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> started;
};

struct SharedMemory {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  char* data = nullptr;
  size_t size = 0;
};

enum class Order { kForward, kReverse, kRandom };

// What runs.
Launch launch{};
const std::function<void()>* thread_body = nullptr;
Fiber fibers[kMaxThreads];
unsigned thread_count = 0, current = 0;
Context scheduler_context{};
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
bool kernel_failed = false;

// Of the running block: bit i stands for a lane of a warp, or for a warp.
unsigned ready_warps, ready_lanes[kWarpSize], alive_lanes[kWarpSize];
unsigned alive_threads, threads_at_barrier, barrier_votes;
int barrier_result, barrier_line;
std::map<int, SharedMemory> shared_variables;
SharedMemory dynamic_memory;
size_t shared_bytes;

// Of the host.
Order order = Order::kForward;
std::mt19937 generator;
std::map<std::string, int> findings;
cudaError_t last_error = cudaSuccess;
std::string last_error_text;
std::unordered_map<const void*, size_t> allowed_dynamic_shared;
int device_guards = 0;
bool unchecked_launch = false;
char stream; // its address is the stream

std::string in_kernel(int line) {
  return std::string(" (") + launch.kernel + ", line " + std::to_string(line) + ")";
}

unsigned pick(unsigned set) { // one of the bits
  switch (order) {
    case Order::kForward:
      return std::countr_zero(set);
    case Order::kReverse:
      return 31 - std::countl_zero(set);
    default:
      for (unsigned skipped = generator() % std::popcount(set); skipped > 0; --skipped) {
        set &= set - 1;
      }
      return std::countr_zero(set);
  }
}

void set_ready(unsigned warp, unsigned lanes) {
  ready_lanes[warp] |= lanes;
  ready_warps |= 1u << warp;
}

void unready(unsigned warp, unsigned lane) {
  ready_lanes[warp] &= ~(1u << lane);
  if (ready_lanes[warp] == 0) {
    ready_warps &= ~(1u << warp);
  }
}

// Lets the block go on if all of its threads are at the barrier.
void try_barrier() {
  if (alive_threads == 0 || threads_at_barrier != alive_threads) {
    return;
  }
  barrier_result = static_cast<int>(barrier_votes);
  threads_at_barrier = barrier_votes = 0;
  races_join_block();
  for (unsigned i = 0; i < thread_count; ++i) {
    if (alive_lanes[i / kWarpSize] >> i % kWarpSize & 1) {
      fibers[i].waits = Waits::kNot;
      set_ready(i / kWarpSize, 1u << i % kWarpSize);
    }
  }
}

// Completes the collective that a lane waits in, if all that it waits for are there.
void try_collective(unsigned warp, unsigned lane) {
  Fiber* const lanes = fibers + warp * kWarpSize;
  const Fiber& first = lanes[lane];
  const unsigned present = first.mask & alive_lanes[warp];
  void* data[kWarpSize] = {};
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (present >> i & 1) {
      const Fiber& other = lanes[i];
      if (other.waits != Waits::kForWarp || other.combine != first.combine || other.mask != first.mask ||
          other.line != first.line) {
        return;
      }
      data[i] = other.data;
    }
  }
  if (first.combine != nullptr) {
    first.combine(data, present);
  } else {
    races_join_warp(warp, present); // only __syncwarp orders accesses to memory
  }
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (present >> i & 1) {
      lanes[i].waits = Waits::kNot;
    }
  }
  set_ready(warp, present);
}

void to_scheduler(bool ended) {
  Fiber& fiber = fibers[current];
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ended ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  switch_context(&fiber.context, &scheduler_context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}


void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*thread_body)();
  const unsigned warp = current / kWarpSize, lane = current % kWarpSize;
  unready(warp, lane);
  alive_lanes[warp] &= ~(1u << lane);
  --alive_threads;
  for (unsigned i = 0; i < kWarpSize; ++i) { // others may wait for this one alone
    if (alive_lanes[warp] >> i & 1 && fibers[warp * kWarpSize + i].waits == Waits::kForWarp) {
      try_collective(warp, i);
    }
  }
  try_barrier();
  to_scheduler(true);
  std::abort();
}

void resume(unsigned index) {
  Fiber& fiber = fibers[index];
  current = index;
  thread_index = dim3(
      index % block_size.x, index / block_size.x % block_size.y, index / block_size.x / block_size.y);
  running_thread = {true, index / kWarpSize, index % kWarpSize};
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  switch_context(&scheduler_context, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running_thread.exists = false;
}

void make_stacks() {
  const size_t bytes = kMaxThreads * (kStackBytes + kPage);
  char* memory = static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) {
    std::abort();
  }
  stacks_begin = memory;
  stacks_end = memory + bytes;
  for (Fiber& fiber : fibers) {
    mprotect(memory, kPage, PROT_NONE); // so that an overflow does not reach the stack below
    fiber.stack = memory + kPage;
    memory += kStackBytes + kPage;
  }
}

SharedMemory make_shared_memory(size_t size, size_t alignment) {
  SharedMemory result;
  const size_t wider = 2 * alignment; // than promised, so that the address can be aligned no better than promised
  result.memory.reset(static_cast<char*>(std::aligned_alloc(wider, (alignment + size + wider - 1) / wider * wider)));
  result.data = result.memory.get() + alignment;
  result.size = size;
  std::memset(result.memory.get(), 0xff, alignment + size);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(result.memory.get(), alignment);
#endif
  return result;
}

void free_shared_memory() {
  const auto release = [](SharedMemory& memory) {
#ifdef __SANITIZE_ADDRESS__
    if (memory.data != nullptr) {
      __asan_unpoison_memory_region(memory.memory.get(), memory.data - memory.memory.get());
    }
#endif
    races_forget(memory.data, memory.size);
    memory = SharedMemory();
  };
  for (auto& [key, memory] : shared_variables) {
    release(memory);
  }
  shared_variables.clear();
  release(dynamic_memory);
}

void report_deadlock() {
  std::string text = "deadlock" + in_kernel(launch.line) + ":";
  std::map<std::string, int> waiting;
  for (unsigned i = 0; i < thread_count; ++i) {
    const Fiber& fiber = fibers[i];
    if (alive_lanes[i / kWarpSize] >> i % kWarpSize & 1) {
      ++waiting
          [std::string(fiber.waits == Waits::kForBlock ? "__syncthreads" : fiber.collective) + " in line " +
           std::to_string(fiber.line)];
    }
  }
  for (const auto& [place, count] : waiting) {
    text += " " + std::to_string(count) + " threads in " + place + ";";
  }
  finding(text);
  last_error = cudaErrorLaunchFailure;
  last_error_text = text;
  kernel_failed = true;
}

void run_block(uint64_t number) {
  block_index = dim3(number % grid_size.x, number / grid_size.x % grid_size.y, number / grid_size.x / grid_size.y);
  races_begin_block(number);
  alive_threads = thread_count;
  threads_at_barrier = barrier_votes = 0;
  shared_bytes = launch.dynamic_shared;
  for (unsigned i = 0; i < thread_count; ++i) {
    Fiber& fiber = fibers[i];
    // As at a function's first instruction: 8 bytes, where the return address would be, below an aligned address.
    fiber.context = {fiber.stack + kStackBytes - 64 - 8, reinterpret_cast<void*>(&run_fiber)};
    fiber.waits = Waits::kNot;
    fiber.groups.clear();
    fiber.started.clear();
    if (i % kWarpSize == 0) {
      ready_lanes[i / kWarpSize] = alive_lanes[i / kWarpSize] = 0;
    }
    alive_lanes[i / kWarpSize] |= 1u << i % kWarpSize;
    set_ready(i / kWarpSize, 1u << i % kWarpSize);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  }
  while (ready_warps != 0 && !kernel_failed) {
    const unsigned warp = pick(ready_warps);
    resume(warp * kWarpSize + pick(ready_lanes[warp]));
  }
  if (alive_threads > 0 && !kernel_failed) {
    report_deadlock();
  }
  ready_warps = 0;
  free_shared_memory();
}

bool coin() {
  return order == Order::kRandom && generator() % 2 == 0;
}

void perform(const Copy& copy) {
  if (copy.global != nullptr) {
    std::memcpy(copy.shared, copy.global, copy.size);
  } else {
    std::memset(copy.shared, 0, copy.size);
  }
}

void refuse(cudaError_t error, const std::string& text) {
  last_error = error;
  last_error_text = text + in_kernel(launch.line);
}

} // namespace

void finding(const std::string& text) {
  ++findings[text];
}

void fail_kernel(cudaError_t error, const std::string& text) {
  last_error = error;
  last_error_text = text + in_kernel(launch.line);
  kernel_failed = true;
  to_scheduler(true);
  std::abort();
}

void run(const Launch& wanted, size_t parameter_bytes, const std::function<void()>& thread) {
  launch = wanted;
  if (unchecked_launch) {
    finding("nobody asked for the error of the launch before" + in_kernel(launch.line));
  }
  unchecked_launch = true;
  if (device_guards == 0) {
    finding("a launch without a device guard" + in_kernel(launch.line));
  }
  if (launch.stream != current_stream()) {
    finding("a launch that is not on the current stream" + in_kernel(launch.line));
  }
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    return refuse(
        cudaErrorInvalidConfiguration,
        "invalid configuration: grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
            std::to_string(grid.z) + ", block " + std::to_string(threads));
  }
  if (parameter_bytes > kMaxParameters) {
    return refuse(cudaErrorInvalidValue, std::to_string(parameter_bytes) + " bytes of parameters");
  }
  const auto allowed = allowed_dynamic_shared.find(launch.function);
  if (launch.dynamic_shared > (allowed != allowed_dynamic_shared.end() ? allowed->second : kSharedDefault)) {
    return refuse(
        cudaErrorInvalidValue,
        std::to_string(launch.dynamic_shared) + " bytes of dynamic shared memory, more than cudaFuncSetAttribute allowed");
  }
  if (stacks_begin == nullptr) {
    make_stacks();
  }
  thread_body = &thread;
  thread_count = static_cast<unsigned>(threads);
  block_size = block;
  grid_size = grid;
  kernel_failed = false;
  std::vector<uint64_t> numbers;
  if (order == Order::kRandom) {
    for (uint64_t i = 0; i < blocks; ++i) {
      numbers.push_back(i);
    }
    std::shuffle(numbers.begin(), numbers.end(), generator);
  }
  for (uint64_t i = 0; i < blocks && !kernel_failed; ++i) {
    run_block(order == Order::kForward ? i : order == Order::kReverse ? blocks - 1 - i : numbers[i]);
  }
  races_forget_all();
}

void* shared_variable(int key, size_t size, size_t alignment) {
  SharedMemory& memory = shared_variables[key];
  if (memory.data == nullptr) {
    memory = make_shared_memory(size, alignment);
    shared_bytes += size;
    if (shared_bytes - launch.dynamic_shared > kSharedDefault) {
      finding("more than 48 KB of static shared memory" + in_kernel(launch.line));
    }
    if (shared_bytes > kSharedMost) {
      finding("more than 227 KB of shared memory" + in_kernel(launch.line));
    }
  }
  return memory.data;
}

void* dynamic_shared(size_t alignment) {
  if (dynamic_memory.data == nullptr) {
    if (launch.dynamic_shared == 0) {
      finding("dynamic shared memory of a launch without any" + in_kernel(launch.line));
    }
    dynamic_memory = make_shared_memory(launch.dynamic_shared, std::max<size_t>(alignment, 16));
  }
  return dynamic_memory.data;
}

bool is_shared(const void* address, size_t size) {
  const char* const begin = static_cast<const char*>(address);
  const auto within = [&](const SharedMemory& memory) {
    return memory.data != nullptr && begin >= memory.data && begin + size <= memory.data + memory.size;
  };
  for (const auto& [key, memory] : shared_variables) {
    if (within(memory)) {
      return true;
    }
  }
  return within(dynamic_memory);
}

int block_barrier(bool predicate, int line) {
  Fiber& fiber = fibers[current];
  if (threads_at_barrier > 0 && barrier_line != line) {
    finding(
        "threads of a block wait in different barriers, lines " + std::to_string(barrier_line) + " and " +
        std::to_string(line) + in_kernel(launch.line));
  }
  barrier_line = line;
  fiber.waits = Waits::kForBlock;
  fiber.line = line;
  ++threads_at_barrier;
  barrier_votes += predicate;
  unready(current / kWarpSize, current % kWarpSize);
  try_barrier();
  to_scheduler(false);
  return barrier_result;
}

void warp_collective(const char* name, unsigned mask, void* data, Combine combine, int line) {
  Fiber& fiber = fibers[current];
  const unsigned warp = current / kWarpSize, lane = current % kWarpSize;
  if ((mask >> lane & 1) == 0) {
    finding(std::string(name) + " by a lane that its mask does not have" + in_kernel(line));
    mask |= 1u << lane;
  }
  fiber.waits = Waits::kForWarp;
  fiber.collective = name;
  fiber.combine = combine;
  fiber.mask = mask;
  fiber.data = data;
  fiber.line = line;
  unready(warp, lane);
  try_collective(warp, lane);
  to_scheduler(false);
}

unsigned lane() {
  return current % kWarpSize;
}

void start_copy(void* shared, const void* global, size_t size, bool wanted) {
  const char* const what = "an asynchronous copy ";
  if (!is_shared(shared, size)) {
    fail_kernel(cudaErrorLaunchFailure, std::string(what) + "to what is not shared memory");
  }
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 || (wanted && reinterpret_cast<uintptr_t>(global) % size != 0)) {
    fail_kernel(cudaErrorLaunchFailure, std::string(what) + "at an address that is not aligned");
  }
  const void* const code = __builtin_return_address(0);
  note_access(shared, size, Access::kWrite, code); // it may happen now or at the latest in wait_for_copies
  if (wanted) {
    note_access(global, size, Access::kRead, code);
  }
  const Copy copy{shared, wanted ? global : nullptr, size};
  if (coin()) {
    perform(copy);
  } else {
    fibers[current].started.push_back(copy);
  }
}

void commit_copies() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.started));
  fiber.started.clear();
}

void wait_for_copies(size_t pending_groups) {
  Fiber& fiber = fibers[current];
  while (fiber.groups.size() > pending_groups) {
    for (const Copy& copy : fiber.groups.front()) {
      note_access(copy.shared, copy.size, Access::kWrite, __builtin_return_address(0));
      perform(copy);
    }
    fiber.groups.pop_front();
  }
}

void enter_device_guard() {
  ++device_guards;
}

void leave_device_guard() {
  --device_guards;
  if (device_guards == 0 && unchecked_launch) {
    finding("nobody asked for the error of a launch" + in_kernel(launch.line));
    unchecked_launch = false;
  }
}

cudaStream_t current_stream() {
  return reinterpret_cast<cudaStream_t>(&stream);
}

cudaError_t take_last_error() {
  unchecked_launch = false;
  return std::exchange(last_error, cudaSuccess);
}

const std::string& error_text() {
  return last_error_text;
}

cudaError_t allow_dynamic_shared(const void* function, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedMost) {
    return cudaErrorInvalidValue;
  }
  allowed_dynamic_shared[function] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

} // namespace simulated

// For Python.
extern "C" {

// 0: forward, 1: reverse, 2: random.
void simulated_set_order(int order, unsigned seed) {
  simulated::order = static_cast<simulated::Order>(order);
  simulated::generator.seed(seed);
}

// The findings since the last call, one a line.
const char* simulated_take_findings() {
  static std::string text;
  text.clear();
  for (const auto& [finding, count] : simulated::findings) {
    text += std::to_string(count) + " x " + finding + "\n";
  }
  simulated::findings.clear();
  return text.c_str();
}
}
