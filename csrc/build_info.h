// What this library was built from. Python reads the text out of the file before it loads it, so that a library built
// for another torch is refused with a message instead of an undefined symbol.

#pragma once

#if __has_include(<torch/headeronly/version.h>)
#include <torch/headeronly/version.h>
#else
#include <torch/version.h> // torch <= 2.8
#endif

#define QUERYMASK_TEXT_OF(...) #__VA_ARGS__
#define QUERYMASK_TEXT(...) QUERYMASK_TEXT_OF(__VA_ARGS__)

#ifdef QUERYMASK_CUDA_VERSION // setup.py defines it and the architectures where it builds the CUDA kernels
#define QUERYMASK_WITH_CUDA 1
#else
#define QUERYMASK_WITH_CUDA 0
#define QUERYMASK_CUDA_VERSION none
#define QUERYMASK_CUDA_ARCHITECTURES none
#endif

#ifdef _OPENMP
#define QUERYMASK_THREADS "OpenMP"
#else
#define QUERYMASK_THREADS "none"
#endif

#ifdef __clang__
#define QUERYMASK_COMPILER __VERSION__ // begins with "Clang"
#else
#define QUERYMASK_COMPILER "g++ " __VERSION__
#endif

namespace querymask {

// clang-format off
inline constexpr char kBuildInfo[] =
    "querymask-build{"
    "\"torch\": \"" TORCH_VERSION "\", "
    "\"cuda\": \"" QUERYMASK_TEXT(QUERYMASK_CUDA_VERSION) "\", "
    "\"cuda_architectures\": \"" QUERYMASK_TEXT(QUERYMASK_CUDA_ARCHITECTURES) "\", "
    "\"compiler\": \"" QUERYMASK_COMPILER "\", "
    "\"threads\": \"" QUERYMASK_THREADS "\"}";
// clang-format on

inline constexpr char kCudaArchitectures[] = QUERYMASK_TEXT(QUERYMASK_CUDA_ARCHITECTURES);

} // namespace querymask
