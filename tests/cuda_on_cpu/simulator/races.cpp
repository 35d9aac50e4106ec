#include "races.h"

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

#include <dlfcn.h>

#include "scheduler.h"

namespace simulated {

RunningThread running_thread{};
const char* stacks_begin = nullptr;
const char* stacks_end = nullptr;

namespace {

constexpr unsigned kWarpSize = 32;
constexpr uintptr_t kPageBytes = 4096;

// When a thread did something: a vector clock over the lanes of its warp, and the number of the block's barriers.
struct Moment {
  uint64_t block = 0;
  uint32_t barrier = 0; // of the block, before it
  uint32_t time = 0; // of its lane
  uint8_t warp = 0, lane = 0;
  Access access{};
  const void* code = nullptr; // nullptr: nothing happened
};

// One byte of memory: its last write, atomic change and two reads, and which warps have read it since the barrier of
// the last read. Two reads of other lanes than a writer's are what a race needs to be seen at once; further ones are
// seen with another order of threads.
struct Byte {
  Moment write, atomic, reads[2];
  uint32_t reading_warps = 0;
};
struct Page {
  Byte bytes[kPageBytes];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page_number = 0;
Page* last_page = nullptr;

uint64_t block = 0;
uint32_t barrier = 0;
uint32_t clocks[kWarpSize][kWarpSize][kWarpSize]; // [warp][lane][other lane]: what the lane knows of the other

bool before(const Moment& then, const Moment& now) { // whether `then` is ordered before `now`, or the same thread's
  if (then.code == nullptr) {
    return true;
  }
  if (then.block != now.block) {
    return false;
  }
  if (then.barrier < now.barrier) {
    return true;
  }
  return then.warp == now.warp && then.time <= clocks[now.warp][now.lane][then.lane];
}

std::string place(const void* code) { // what the tests turn into file and line
  Dl_info info{};
  dladdr(code, &info);
  return "@" + std::to_string(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase));
}

void report(const Moment& then, const Moment& now, const char* kind) {
  const bool one_block = then.block == now.block;
  finding(
      std::string("race: ") + kind + " in " + (one_block ? then.warp == now.warp ? "one warp" : "one block" : "two blocks") +
      ": " + place(then.code) + " and " + place(now.code));
}

Page& page_of(uintptr_t number) {
  if (last_page == nullptr || number != last_page_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) {
      page = std::make_unique<Page>();
    }
    last_page = page.get();
    last_page_number = number;
  }
  return *last_page;
}

} // namespace

void races_begin_block(uint64_t number) {
  block = number;
  barrier = 0;
  std::memset(clocks, 0, sizeof(clocks));
  for (auto& warp : clocks) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      warp[lane][lane] = 1;
    }
  }
}

void races_join_block() {
  ++barrier;
}

void races_join_warp(unsigned warp, unsigned lanes) {
  uint32_t joined[kWarpSize] = {};
  for (unsigned i = 0; i < kWarpSize; ++i) {
    for (unsigned k = 0; lanes >> i & 1 && k < kWarpSize; ++k) {
      joined[k] = joined[k] < clocks[warp][i][k] ? clocks[warp][i][k] : joined[k];
    }
  }
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (lanes >> i & 1) {
      std::memcpy(clocks[warp][i], joined, sizeof(joined));
      ++clocks[warp][i][i];
    }
  }
}

void races_forget(const void* address, size_t size) {
  for (uintptr_t at = reinterpret_cast<uintptr_t>(address), end = at + size; at < end; ++at) {
    if (pages.count(at / kPageBytes)) {
      page_of(at / kPageBytes).bytes[at % kPageBytes] = Byte();
    }
  }
}

void races_forget_all() {
  pages.clear();
  last_page = nullptr;
}

void note_access(const void* address, size_t size, Access access, const void* code) {
#ifdef SIMULATED_RACES
  if (!running_thread.exists || (address >= stacks_begin && address < stacks_end)) {
    return;
  }
  const unsigned warp = running_thread.warp, lane = running_thread.lane;
  const Moment now{
      block, barrier, clocks[warp][lane][lane], static_cast<uint8_t>(warp), static_cast<uint8_t>(lane), access, code};
  for (uintptr_t at = reinterpret_cast<uintptr_t>(address), end = at + size; at < end; ++at) {
    Byte& byte = page_of(at / kPageBytes).bytes[at % kPageBytes];
    const bool reported_before = at > reinterpret_cast<uintptr_t>(address); // once for an access
    if (!before(byte.write, now) && !reported_before) {
      report(byte.write, now, access == Access::kRead ? "a read after a write" : "two writes");
    }
    if (access != Access::kAtomic && !before(byte.atomic, now) && !reported_before) {
      report(byte.atomic, now, access == Access::kRead ? "a read after an atomic" : "a write after an atomic");
    }
    if (access == Access::kRead) {
      Moment& newest = byte.reads[0];
      if (newest.code == nullptr || newest.block != block || newest.barrier != barrier) {
        byte.reading_warps = 0;
      }
      byte.reading_warps |= 1u << warp;
      if (newest.lane != now.lane || newest.warp != now.warp || newest.block != now.block) {
        byte.reads[1] = newest;
      }
      newest = now;
      continue;
    }
    if (!reported_before) {
      const Moment& newest = byte.reads[0];
      if (!before(newest, now)) {
        report(newest, now, "a write after a read");
      } else if (!before(byte.reads[1], now)) {
        report(byte.reads[1], now, "a write after a read");
      } else if (newest.block == block && newest.barrier == barrier && (byte.reading_warps & ~(1u << warp)) != 0) {
        report(newest, now, "a write after a read of another warp");
      }
    }
    (access == Access::kAtomic ? byte.atomic : byte.write) = now;
  }
#endif
}

} // namespace simulated

#ifdef SIMULATED_RACES
// What code compiled with -fsanitize=thread calls before its accesses. The sanitizer's own library is not linked.
using simulated::Access;
using simulated::note_access;

extern "C" {
#define ACCESS(name, size, access)                                        \
  void __tsan_##name##size(void* address) {                               \
    note_access(address, size, access, __builtin_return_address(0));      \
  }
#define ACCESSES(size)                                      \
  ACCESS(read, size, Access::kRead)                         \
  ACCESS(write, size, Access::kWrite)                       \
  ACCESS(unaligned_read, size, Access::kRead)               \
  ACCESS(unaligned_write, size, Access::kWrite)             \
  ACCESS(volatile_read, size, Access::kRead)                \
  ACCESS(volatile_write, size, Access::kWrite)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* address, size_t size) {
  note_access(address, size, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  note_access(address, size, Access::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}

// Only the host's code has atomics of C++: reference counts of tensors.
#define HOST_ATOMICS(bits, T)                                                                                        \
  T __tsan_atomic##bits##_load(const volatile T* address, int) {                                                     \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                  \
  void __tsan_atomic##bits##_store(volatile T* address, T value, int) {                                              \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                  \
  T __tsan_atomic##bits##_exchange(volatile T* address, T value, int) {                                              \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                                  \
  T __tsan_atomic##bits##_fetch_add(volatile T* address, T value, int) {                                             \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                                  \
  T __tsan_atomic##bits##_fetch_sub(volatile T* address, T value, int) {                                             \
    return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                                  \
  T __tsan_atomic##bits##_fetch_or(volatile T* address, T value, int) {                                              \
    return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                                  \
  T __tsan_atomic##bits##_fetch_and(volatile T* address, T value, int) {                                             \
    return __atomic_fetch_and(address, value, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* address, T* expected, T value, int, int) {           \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }                                                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* address, T* expected, T value, int, int) {             \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
HOST_ATOMICS(8, unsigned char)
HOST_ATOMICS(32, unsigned)
HOST_ATOMICS(64, unsigned long)
}
#endif
