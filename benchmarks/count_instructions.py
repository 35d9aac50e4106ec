"""Counts the instructions of the CUDA kernels' inner loops, and the time that issuing them takes at least.

    python benchmarks/count_instructions.py --save benchmarks/results/cuda_instructions.md

No GPU: nvcc compiles for sm_90, cuobjdump (of a CUDA toolkit, or triton's) disassembles. The inner loop of a kernel is
the smallest one with the most of its marks, instructions that occur a known number of times for each sample; counted is
the shortest way through it that issues all of them, predicated instructions included. One instruction of a warp serves
one sample of each (query, head) that the warp has, hence "instructions a warp and sample".

Around the loop, samples are prepared and the threads' parts added up: the rest of the shortest way through the loop
around it that accesses memory most often, divided by the samples that are prepared at once. An H100 issues at most 4
instructions a clock and multiprocessor, which bounds the time from below.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ACCESS = 1 << 16  # what another access to memory counts among marks
ISSUES_PER_SECOND = 132 * 4 * 1.755e9  # of an H100 SXM
# 800x1066, batch 2: tokens, each a query of 8 heads with 4 levels of 4 points
SAMPLES = 2 * (100 * 134 + 50 * 67 + 25 * 34 + 13 * 17) * 8 * 16


@dataclass(frozen=True)
class Kernel:
    """A kernel to count.

    Attributes:
        label: its row of the table.
        pattern: of its mangled name.
        mark: pattern of the instructions that mark a sample.
        marks: how many of them a sample has.
        lanes: threads that serve one sample.
        prepared: samples of a (query, head) that are prepared at once; 0 if the loop around is not to be counted.
        samples: of the whole call.
    """

    label: str
    pattern: str
    mark: str
    marks: int
    lanes: int
    prepared: int
    samples: int = SAMPLES


MSDA = [
    Kernel("forward, float32", r"forward_kernelIffjLi4ELi8E", r"LDG\.E\.128", 4, 8, 8),
    Kernel("forward, bfloat16", r"forward_kernelIN3c108BFloat16EfjLi8ELi4E", r"LDG\.E\.128", 4, 4, 4),
    Kernel("forward, float16", r"forward_kernelIN3c104HalfEfjLi8ELi4E", r"LDG\.E\.128", 4, 4, 4),
    Kernel("backward, float32", r"backward_kernelIffjLi4ELi8E", r"LDG\.E\.128|RED", 8, 8, 8),
    Kernel("backward, bfloat16", r"backward_kernelIN3c108BFloat16EfjLi8ELi4E", r"LDG\.E\.128|RED", 12, 4, 4),
    Kernel("backward, float16", r"backward_kernelIN3c104HalfEfjLi8ELi4E", r"LDG\.E\.128|RED", 12, 4, 4),
    # One sample is in the sums of four tokens; 32 parts of such sums are prepared at once.
    Kernel("sum in order, float32", r"gather_kernelIffLi4E", r"LDG\.E\.128", 4, 8, 2),
    Kernel("sum in order, bfloat16", r"gather_kernelIN3c108BFloat16EfLi8E", r"LDG\.E\.128", 4, 4, 1),
]
OPERATORS = {"msda": (ROOT / "csrc/msda/cuda.cu", MSDA)}


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: int
    text: str  # with its predicate, without the semicolon

    @property
    def accesses_memory(self) -> bool:
        return re.search(r"\b(LDG|LDS|STS)\b", self.text) is not None

    def successors(self, following: int | None) -> list[int]:
        """Addresses that may come next."""
        found = re.match(r"(@\S+ )?(BRA|EXIT|RET)\b(?:.*?\b0x([0-9a-f]+))?", self.text)
        jumps = [] if found is None or found[2] != "BRA" or found[3] is None else [int(found[3], 16)]
        conditional = found is None or found[1] is not None or re.match(r"BRA\.DIV|BRA\S* !?U?P\d", self.text)
        return jumps + ([following] if following is not None and conditional else [])


@dataclass(frozen=True)
class Listing:
    """A kernel as cuobjdump shows it."""

    name: str
    resources: dict[str, int]
    instructions: list[Instruction]


@dataclass(frozen=True)
class Count:
    """Instructions a warp and sample."""

    loop: float
    preparation: float


def read_listings(text: str) -> Iterator[Listing]:
    """The kernels in the output of ``cuobjdump -res-usage -sass``."""
    resources = {
        name: {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
        for name, line in re.findall(r"^ Function (\S+):\n(.*)$", text, re.MULTILINE)
    }
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name = part.split(maxsplit=1)[0]
        found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", part, re.MULTILINE)
        yield Listing(name, resources.get(name, {}), [Instruction(int(address, 16), line) for address, line in found])


class Graph:
    """A kernel's instructions and which may follow which."""

    def __init__(self, instructions: list[Instruction], mark: str) -> None:
        following = [instruction.address for instruction in instructions[1:]]
        self.next = {
            instruction.address: instruction.successors(after)
            for instruction, after in zip(instructions, [*following, None], strict=True)
        }
        self.before: dict[int, list[int]] = {address: [] for address in self.next}
        for address, successors in self.next.items():
            for successor in successors:
                self.before[successor].append(address)
        self.marks = {
            instruction.address: 1 if re.search(mark, instruction.text) else ACCESS * instruction.accesses_memory
            for instruction in instructions
        }

    def loops(self) -> list[tuple[int, int, set[int]]]:
        """First and last instruction of every loop, and all that it has."""
        found = []
        for last, successors in self.next.items():
            for first in successors:
                if first > last:
                    continue
                members, waiting = {first, last}, [last]
                while waiting:
                    for address in self.before[waiting.pop()]:
                        if address not in members and address >= first:
                            members.add(address)
                            waiting.append(address)
                found.append((first, last, members))
        return found

    def shortest(self, first: int, last: int, members: set[int]) -> dict[int, int]:
        """Instructions of the shortest way from first to last that goes forwards only, by the marks on the way."""
        start = (first, self.marks[first])
        lengths, waiting = {start: 1}, deque([start])
        while waiting:
            address, marks = state = waiting.popleft()
            for after in self.next[address]:
                if after in members and after > address:
                    follower = (after, marks + self.marks[after])
                    if follower not in lengths:
                        lengths[follower] = lengths[state] + 1
                        waiting.append(follower)
        return {marks: length for (address, marks), length in lengths.items() if address == last}


def count(kernel: Kernel, instructions: list[Instruction]) -> Count:
    """Counts the inner loop and what surrounds it.

    Raises:
        ValueError: there is no loop with the kernel's marks.
    """
    graph = Graph(instructions, kernel.mark)
    loops = [(loop[2], graph.shortest(*loop)) for loop in graph.loops()]
    loops = [(members, lengths) for members, lengths in loops if max(marks % ACCESS for marks in [0, *lengths]) > 0]
    innermost = [loop for loop in loops if not any(other[0] < loop[0] for other in loops)]
    if not innermost:
        raise ValueError(f"no loop has {kernel.mark} in {kernel.label}")
    members, lengths = max(innermost, key=lambda loop: max(loop[1]) % ACCESS)  # the unrolled one, not what is left over
    marks = max(lengths)
    length = lengths[marks]
    marks %= ACCESS
    around = min((loop for loop in loops if loop[0] > members), key=lambda loop: len(loop[0]), default=None)
    preparation = 0.0
    if around is not None and kernel.prepared:
        through = max(found for found in around[1] if found % ACCESS == marks)
        preparation = (around[1][through] - length) / kernel.prepared
    return Count(length * kernel.marks / marks, preparation)


def find_program(name: str) -> str:
    """Path of a program of the CUDA toolkit, or of the copy in triton's package.

    Raises:
        FileNotFoundError: there is none.
    """
    candidates = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    try:
        import triton
    except ImportError:
        pass
    else:
        candidates.append(str(Path(triton.__file__).parent / "backends/nvidia/bin" / name))
    for path in candidates:
        if path is not None and Path(path).is_file():
            return path
    raise FileNotFoundError(f"there is no {name}: install a CUDA toolkit and put its bin folder on the PATH")


def disassemble(source: Path, architecture: str) -> str:
    """The listing of a CUDA source."""
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        includes = [f"-I{path}" for path in include_paths("cuda")]
        # As setup.py and torch's extension builder compile
        flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DQUERYMASK_CUDA_VERSION=0"]
        flags.append(f"-DQUERYMASK_CUDA_ARCHITECTURES={architecture}")
        command = [find_program("nvcc"), "-cubin", f"-arch={architecture}", *flags, *includes, str(source)]
        subprocess.run([*command, "-o", str(cubin)], check=True)
        command = [find_program("cuobjdump"), "-res-usage", "-sass", str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_table(kernels: list[Kernel], listings: list[Listing]) -> list[str]:
    """Rows of Markdown."""
    rows = [
        "| kernel | loop | preparation | bound µs | registers | stack B | shared B |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kernel in kernels:
        listing = next((listing for listing in listings if re.search(kernel.pattern, listing.name)), None)
        if listing is None:
            raise ValueError(f"no kernel whose name matches {kernel.pattern}: its template arguments have changed")
        counted = count(kernel, listing.instructions)
        warps = kernel.samples * kernel.lanes / 32
        microseconds = (counted.loop + counted.preparation) * warps / ISSUES_PER_SECOND * 1e6
        resources = [listing.resources.get(key, 0) for key in ("REG", "STACK", "SHARED")]
        cells = [f"{counted.loop:.1f}", f"{counted.preparation:.1f}", f"{microseconds:.0f}", *map(str, resources)]
        rows.append(f"| {kernel.label} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--listing", type=Path, help="output of `cuobjdump -res-usage -sass`, instead of compiling")
    parser.add_argument("--save", type=Path, help="write the table to this file as well")
    args = parser.parse_args()
    lines = [
        "# Instructions of the CUDA kernels",
        "",
        "Written by `benchmarks/count_instructions.py`, without a GPU.",
        "",
        f"Compiled for {args.architecture}. Loop, preparation: instructions a warp and sample. Bound: the time that an",
        "H100 (132 multiprocessors, 4 instructions a clock, 1.755 GHz) takes at least to issue them for",
        "800x1066, batch 2. A stack means that registers are spilled.",
    ]
    for name in args.operators:
        source, kernels = OPERATORS[name]
        text = args.listing.read_text() if args.listing else disassemble(source, args.architecture)
        lines += ["", f"## {name}", "", *write_table(kernels, list(read_listings(text)))]
    table = "\n".join(lines) + "\n"
    print(table)
    if args.save is not None:
        args.save.write_text(table)


if __name__ == "__main__":
    main()
