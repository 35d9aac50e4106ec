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

import re
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.instructions import ACCESS, Graph, Instruction, Listing, disassemble, read_listings

from querymask.command_line import add_save, make_parser, markdown_table, show_page

ROOT = Path(__file__).parents[1]
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
    Kernel("backward, float32", r"backward_kernelIffjLi4ELi8E", r"LDG\.E\.128", 4, 8, 8),
    Kernel("backward, bfloat16", r"backward_kernelIN3c108BFloat16EfjLi8ELi4E", r"LDG\.E\.128", 4, 4, 4),
    Kernel("backward, float16", r"backward_kernelIN3c104HalfEfjLi8ELi4E", r"LDG\.E\.128", 4, 4, 4),
    # The gradient of value: a thread enters its sample in the lists of four tokens, which others then sum up.
    Kernel("lists, float32", r"joined_kernelIffLi4E", r"ATOMS\.EXCH", 4, 1, 0),
    Kernel("sums, float32", r"joined_kernelIffLi4E", r"LDS\.128", 4, 8, 0),
    Kernel("lists, bfloat16", r"joined_kernelIN3c108BFloat16EfLi4E", r"ATOMS\.EXCH", 4, 1, 0),
    Kernel("sums, bfloat16", r"joined_kernelIN3c108BFloat16EfLi4E", r"LDS\.128", 4, 8, 0),
    # One sample is in the sums of four tokens; 32 parts of such sums are prepared at once.
    Kernel("sum in order, float32", r"gather_kernelIffLi4E", r"LDG\.E\.128", 4, 8, 2),
    Kernel("sum in order, bfloat16", r"gather_kernelIN3c108BFloat16EfLi8E", r"LDG\.E\.128", 4, 4, 1),
]
OPERATORS = {"msda": (ROOT / "csrc/msda/cuda.cu", MSDA)}
NOTES = {
    "msda": (
        "In 16 bits the forward loop cannot go below 70 in this form: of four neighbours a thread converts 8",
        "channels each to float32 (32), multiplies and adds them (32), and it loads them (4) and the sample",
        "(2). What is left are four addresses and the loop. Products of two halves at once (HFMA2) would",
        "round each sum to 16 bits, bfloat16's upper half is no exact float32 unless the lower one is cut",
        "off, and products of two float32 at once are sm_100's.",
    )
}


@dataclass(frozen=True)
class Count:
    """Instructions a warp and sample."""

    loop: float
    preparation: float


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


def write_table(kernels: list[Kernel], listings: list[Listing]) -> str:
    """The table in Markdown."""
    rows = []
    for kernel in kernels:
        listing = next((listing for listing in listings if re.search(kernel.pattern, listing.name)), None)
        if listing is None:
            raise ValueError(f"no kernel whose name matches {kernel.pattern}: its template arguments have changed")
        counted = count(kernel, listing.instructions)
        warps = kernel.samples * kernel.lanes / 32
        microseconds = (counted.loop + counted.preparation) * warps / ISSUES_PER_SECOND * 1e6
        resources = [listing.resources.get(key, 0) for key in ("REG", "STACK", "SHARED")]
        cells = [f"{counted.loop:.1f}", f"{counted.preparation:.1f}", f"{microseconds:.0f}", *map(str, resources)]
        rows.append([kernel.label, *cells])
    header = ("kernel", "loop", "preparation", "bound µs", "registers", "stack B", "shared B")
    return markdown_table(rows, header)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--listing", type=Path, help="output of `cuobjdump -res-usage -sass`, instead of compiling")
    add_save(parser)
    args = parser.parse_args()
    lines = [
        f"Compiled without a GPU, for {args.architecture}. Loop, preparation: instructions a warp and sample.",
        "Bound: the time that an H100 (132 multiprocessors, 4 instructions a clock, 1.755 GHz) takes at least to issue",
        "them for 800x1066, batch 2. A stack means that registers are spilled.",
    ]
    for name in args.operators:
        source, kernels = OPERATORS[name]
        text = args.listing.read_text() if args.listing else disassemble(source, args.architecture)
        lines += ["", f"## {name}", "", write_table(kernels, list(read_listings(text))), "", *NOTES[name]]
    show_page("Instructions of the CUDA kernels", "benchmarks/count_instructions.py", "\n".join(lines), args.save)


if __name__ == "__main__":
    main()
