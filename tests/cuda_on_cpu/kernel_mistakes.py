"""Mistakes that kernels could have, planted one at a time: whether some case finds each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMMON, FORWARD, BACKWARD = "cuda_common.h", "msda/cuda_forward.h", "msda/cuda_backward.h"
SAMPLING, DETERMINISTIC, MSDA = "msda/cuda_sampling.h", "msda/cuda_deterministic.h", "msda/cuda.cu"
JOINED = "msda/cuda_joined.h"
SPS, TENSOR_CORE = "sps/cuda.cu", "sps/cuda_tensor_core.cu"


@dataclass(frozen=True)
class Mistake:
    """Text of a file that is replaced, wherever it stands, and the variant and cases that must find it."""

    file: str
    old: str
    new: str
    variant: str
    cases: tuple[str, ...]

    def edit(self, path: str, text: str) -> str:
        return text.replace(self.old, self.new) if path == self.file else text


def missing_texts(csrc: Path) -> list[str]:
    """Names of the mistakes that the sources no longer have a place for: they need to be written anew."""
    return [name for name, mistake in MISTAKES.items() if mistake.old not in (csrc / mistake.file).read_text()]


def plain(file: str, old: str, new: str, *cases: str) -> Mistake:
    return Mistake(file, old, new, "plain", cases)


def races(file: str, old: str, new: str, *cases: str) -> Mistake:
    return Mistake(file, old, new, "races", cases)


def sanitizers(file: str, old: str, new: str, *cases: str) -> Mistake:
    return Mistake(file, old, new, "sanitizers", cases)


MISTAKES: dict[str, Mistake] = {
    # Multi-scale deformable attention.
    "forward writes samples that others still read": races(
        FORWARD, "__syncwarp(kWarp); // everyone is done with the samples before", "", "msda,widths-32"
    ),
    "forward reads samples that are not there yet": races(
        FORWARD, "        __syncwarp(kWarp);\n        if (channel", "        if (channel", "msda,widths-32"
    ),
    "backward reads products that are not there yet": races(
        BACKWARD, "        __syncwarp(kWarp);\n        if (prepares) {\n", "        if (prepares) {\n", "msda,widths-32"
    ),
    "gradients are added without atomics": races(
        COMMON, "atomicAdd(address + i, channels[i]);", "address[i] += channels[i];", "msda,crowded-33"
    ),
    "a shuffle in a branch": plain(
        BACKWARD,
        "      for (int distance = group / 2; distance > 0; distance /= 2) {\n        zero +=",
        "      for (int distance = group / 2; wanted && distance > 0; distance /= 2) {\n        zero +=",
        "msda,widths-300",
    ),
    "gradients are overwritten while they are read": races(
        JOINED, "__syncthreads(); // everyone is done with the gradients before", "", "msda,widths-300"
    ),
    "lists are read before they are whole": races(
        JOINED, "        __syncthreads();\n        const int found", "        const int found", "msda,encoder"
    ),
    "slots are freed while they are read": races(
        JOINED, "__syncwarp(kWarp); // all threads of the token have read its slot", "", "msda,encoder"
    ),
    "tokens are taken for one that meet in a slot": plain(
        JOINED, "while (before != -1 && before != token)", "while (false)", "msda,scattered"
    ),
    "tokens are summed up again": plain(JOINED, "counts[turn ^ 1] = 0;", "", "msda,encoder"),
    "the right border is a pixel too early": plain(
        SAMPLING, "x < static_cast<C>(width) && y", "x < static_cast<C>(width - 1) && y", "msda,borders"
    ),
    "neighbours outside are read": plain(SAMPLING, "left && right ? factor : 0", "factor", "msda,widths-32"),
    "tiles lie too far apart": plain(
        SAMPLING, "tile / columns * (members / kTileWidth)", "tile / columns * kTileWidth", "msda,encoder"
    ),
    "samples of groups lie too far apart": sanitizers(
        FORWARD, "shared + member * (group + 1)", "shared + member * (group + 2)", "msda,widths-32", "msda,encoder"
    ),
    "addresses are taken for aligned": sanitizers(
        MSDA,
        "% 16 == 0 ? contiguous : contiguous.clone()",
        "% 1 == 0 ? contiguous : contiguous.clone()",
        "msda,offsets",
    ),
    "a grid with too many rows": plain(
        MSDA, "std::min<int64_t>(geometry.B * geometry.M, 65535)", "geometry.B * geometry.M", "msda,large-heads"
    ),
    "wide heads keep one part's gradients": plain(BACKWARD, "if (first > 0) {", "if (false) {", "msda,widths-300"),
    "neighbours outside hide an infinite gradient": plain(
        BACKWARD, "C dots[4] = {zero, zero, zero, zero};", "C dots[4] = {};", "msda,infinite-grad"
    ),
    "atomics where the order must be fixed": plain(
        MSDA,
        "const bool in_order = at::globalContext().deterministicAlgorithms();",
        "const bool in_order = false;",
        "msda,deterministic",
    ),
    "a cell of two is left out": plain(DETERMINISTIC, "begins[left + 2]", "begins[left + 1]", "msda,deterministic"),
    "nobody asks for errors of launches": plain(MSDA, "      check_launch();\n", "", "msda,widths-32"),
    # Sparse convolution.
    "the device is not set": plain(SPS, "const c10::cuda::CUDAGuard guard(features.device());", "", "sps,widths-16"),
    "threads beyond the last item work, too": sanitizers(
        SPS, "if (index >= geometry.items) {", "if (false) {", "sps,widths-17"
    ),
    "threads beyond the last cell work, too": sanitizers(SPS, "  if (cell < A) {", "  if (true) {", "sps,widths-32"),
    "every chunk begins at the first cell": plain(
        SPS, "geometry.first + pair / geometry.taps", "pair / geometry.taps", "sps,chunks"
    ),
    "all branches have the dilation of the first": plain(
        SPS, "sizes.dilation[2 * branch + 1]", "sizes.dilation[1]", "sps,branches-3x10", "sps,branches-16x24"
    ),
    "all branches read the neighbours of the first": plain(
        TENSOR_CORE, "first_tap = blockIdx.z * product.taps", "first_tap = 0", "sps,branches-16x24"
    ),
    "gradients of all branches are those of the first": plain(
        TENSOR_CORE, "own_cell * gridDim.z + blockIdx.z", "own_cell * gridDim.z", "sps,branches-16x24"
    ),
    "parts of a branch go to the next one": plain(
        TENSOR_CORE, "blockIdx.z / product.branches * product.part", "blockIdx.z * product.part", "sps,branches-24x80"
    ),
    "a tile is overwritten while it is read": races(
        TENSOR_CORE, "__syncthreads(); // all copies of this chunk", "// all copies of this chunk", "sps,widths-64"
    ),
    "rows are read before they are there": races(
        TENSOR_CORE, "  __syncthreads();\n  float sums", "  float sums", "sps,widths-64"
    ),
    "copies are awaited a group too late": plain(
        TENSOR_CORE, "copy_async_wait<kCount - 2>();", "copy_async_wait<kCount - 1>();", "sps,widths-64"
    ),
    "outside counts as the first row": plain(
        TENSOR_CORE, "* product.left_units, row >= 0);", "* product.left_units, true);", "sps,widths-64"
    ),
    "shared memory that nobody asked for": plain(
        TENSOR_CORE,
        "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))",
        "cudaSuccess",
        "sps,widths-64",
    ),
    "fragments overlap": plain(
        TENSOR_CORE,
        "stage + (left_at ^ 2 * step) + 16 * i * kDepth",
        "stage + (left_at ^ 2 * step) + 8 * i * kDepth",
        "sps,widths-64",
    ),
    "sums are put where a tile is still read": races(
        TENSOR_CORE, "__syncthreads(); // everyone is done with the stages", "", "sps,widths-64"
    ),
    "sums are added before they are there": races(
        TENSOR_CORE, "  __syncthreads();\n  const int column", "  const int column", "sps,widths-64"
    ),
}


def find(failures_with: Callable[[Mistake], list[str]], names: list[str]) -> list[str]:
    """Prints what finds each mistake; ``failures_with`` returns failures. Returns those that nothing finds."""
    missed = []
    for number, name in enumerate(names):
        failures = failures_with(MISTAKES[name])
        print(f"{number + 1} of {len(names)}, {name}: {failures[0] if failures else 'NOT FOUND'}", flush=True)
        missed += [] if failures else [name]
    return missed
