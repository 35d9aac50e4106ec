// Which copy of a kernel compiled by foreach_isa.h to run.

#pragma once

#include <string>

#include <ATen/Version.h>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define QUERYMASK_X86_ISAS 1 // where there is more than the compiler's own choice
#else
#define QUERYMASK_X86_ISAS 0
#endif

namespace querymask {

enum class Isa { baseline, avx2, avx512 };

// torch's own choice for this processor, which ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers.
inline Isa isa() {
  static const Isa chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Isa::avx512 : capability == "AVX2" ? Isa::avx2 : Isa::baseline;
  }();
  return chosen;
}

} // namespace querymask

// The function of that name from the namespace of the instruction set in use.
#if QUERYMASK_X86_ISAS
#define QUERYMASK_BY_ISA(...) \
  (::querymask::isa() == ::querymask::Isa::avx512     ? avx512::__VA_ARGS__ \
       : ::querymask::isa() == ::querymask::Isa::avx2 ? avx2::__VA_ARGS__ \
                                                      : baseline::__VA_ARGS__)
#else
#define QUERYMASK_BY_ISA(...) (baseline::__VA_ARGS__)
#endif
