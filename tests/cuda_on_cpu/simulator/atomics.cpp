#include "device.h"

#include <string>

namespace {

template <typename T, typename Change>
T change(T* address, const char* name, const void* code, const Change& changed) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    ::simulated::finding(std::string(name) + " at an address that is not aligned");
  }
  ::simulated::note_access(address, sizeof(T), ::simulated::Access::kAtomic, code);
  const T before = *address;
  *address = changed(before);
  return before;
}

// Components one by one: the whole is not atomic.
template <typename V>
V add_components(V* address, V value, const void* code) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(V) != 0) {
    ::simulated::finding("atomicAdd of a vector at an address that is not aligned");
  }
  float* const target = reinterpret_cast<float*>(address);
  float* const parts = reinterpret_cast<float*>(&value);
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) {
    parts[i] = change(target + i, "atomicAdd", code, [&](float before) { return before + parts[i]; });
  }
  return value;
}

} // namespace

#define CODE __builtin_return_address(0)
#define ATOMIC(name, T, expression)                                             \
  T name(T* address, T value) {                                                 \
    return change(address, #name, CODE, [&](T before) { return expression; });  \
  }
ATOMIC(atomicAdd, float, before + value)
ATOMIC(atomicAdd, double, before + value)
ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value)))
ATOMIC(atomicAdd, unsigned, before + value)
ATOMIC(atomicAdd, unsigned long long, before + value)
ATOMIC(atomicMax, int, std::max(before, value))
ATOMIC(atomicMax, unsigned, std::max(before, value))
ATOMIC(atomicMin, int, std::min(before, value))
ATOMIC(atomicExch, int, value)
ATOMIC(atomicExch, unsigned, value)
ATOMIC(atomicOr, unsigned, before | value)
#define COMPARE_AND_SWAP(T)                                                                                     \
  T atomicCAS(T* address, T expected, T value) {                                                                \
    return change(address, "atomicCAS", CODE, [&](T before) { return before == expected ? value : before; });   \
  }
COMPARE_AND_SWAP(int)
COMPARE_AND_SWAP(unsigned)
COMPARE_AND_SWAP(unsigned long long)

float2 atomicAdd(float2* address, float2 value) {
  return add_components(address, value, CODE);
}
float4 atomicAdd(float4* address, float4 value) {
  return add_components(address, value, CODE);
}
