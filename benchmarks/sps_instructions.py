"""Counts the instructions of the sparse convolution on tensor cores, and what bounds its time.

    python benchmarks/sps_instructions.py --save benchmarks/results/sps_instructions.md

No GPU: nvcc compiles for sm_90, cuobjdump disassembles (see count_instructions.py). Counted are all instructions of the
loop over chunks, in which a tile's sum is computed. The times are what an H100 needs at least for 40,000 cells, C
channels in and out, 3 x 3 taps: to issue the loop's instructions, for the products at the tensor cores' dense peak, for
the traffic of shared memory, and for that of the L2 cache if no row is found in L1.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_parts.instructions import Graph, Listing, disassemble, read_listings
from tabulate import tabulate

from querymask.command_line import add_save, make_parser, show_page

ROOT = Path(__file__).parents[1]
CELLS, TAPS, WIDTHS = 40_000, 9, (32, 64, 128)
SIDE, WARPS, WANTED_BLOCKS = 128, 4, 264  # as in csrc/sps/cuda_tensor_core.cu, like the next two
STAGE_ROW = {"forward": 128, "backward_features": 128, "backward_weight": 64}  # bytes of a tile's row in a chunk
STAGES = {"forward": 2, "backward_features": 2, "backward_weight": 4}
MULTIPROCESSORS, CLOCK, L2 = 132, 1.755e9, 5.5e12  # of an H100 SXM; bytes a second
TYPES = {"TF32": ("f", 4), "bfloat16": ("N3c108BFloat16E", 2)}
KERNELS = ("forward", "backward_features", "backward_weight")


@dataclass(frozen=True)
class Work:
    """One call: tiles of rows by columns, and how many chunks a tile's sum has."""

    rows: int
    columns: int
    tiles: int
    chunks: int


def work(kernel: str, channels: int, size: int) -> Work:
    """What a kernel does for ``channels`` in and out."""
    stage_row = STAGE_ROW[kernel]
    row_tiles, column_tiles = math.ceil(CELLS / SIDE), math.ceil(TAPS * channels / SIDE)
    if kernel == "forward":
        return Work(SIDE, channels, row_tiles, math.ceil(TAPS * channels * size / stage_row))
    if kernel == "backward_features":
        return Work(SIDE, SIDE, row_tiles * column_tiles, math.ceil(channels * size / stage_row))
    part = math.ceil(math.ceil(CELLS / math.ceil(WANTED_BLOCKS / column_tiles)) / 256) * 256
    return Work(channels, SIDE, math.ceil(CELLS / part) * column_tiles, math.ceil(part * size / stage_row))


def count_loop(listing: Listing) -> Counter[str]:
    """The instructions of the smallest loop with products, by their first word."""
    text = {instruction.address: instruction.text for instruction in listing.instructions}
    loops = [members for _, _, members in Graph(listing.instructions, "HMMA").loops()]
    loops = [members for members in loops if any("HMMA" in text[address] for address in members)]
    if not loops:
        raise ValueError(f"{listing.name} has no loop with products")
    lines = [text[address] for address in min(loops, key=len) if not text[address].startswith("@!PT")]
    return Counter(re.match(r"(?:@\S+ )?(\w+)", line)[1] for line in lines)


COLUMNS = ("kernel", "C", "type", "instructions a chunk", "HMMA", "registers", "stack B", "shared KB", "blocks/SM")
COLUMNS += ("issue µs", "tensor µs", "shared µs", "L2 µs")


def rows(listings: list[Listing]) -> Iterator[list[object]]:
    """The cells of the table's rows."""
    for kernel in KERNELS:
        for channels in WIDTHS:
            for name, (mangled, size) in TYPES.items():
                arguments = f"I{mangled}E" if kernel == "backward_features" else f"I{mangled}Li{channels}E"
                listing = next((one for one in listings if f"{kernel}_kernel{arguments}" in one.name), None)
                if listing is None:
                    raise ValueError(f"no {kernel}_kernel with {arguments}: its template arguments have changed")
                counts, load = count_loop(listing), work(kernel, channels, size)
                total, trips = counts.total(), load.tiles * load.chunks
                stage = STAGE_ROW[kernel] * (load.rows + load.columns)
                cycles = {  # a product has 1024 or, of 16 bits, 2048 multiply-adds, as many as a clock
                    "issue": trips * WARPS * total / 4,
                    "tensor": trips * WARPS * counts["HMMA"],
                    "shared": trips * (WARPS * (512 * counts["LDSM"] + 128 * counts["LDS"]) + stage) / 128,
                }
                times = [value / MULTIPROCESSORS / CLOCK * 1e6 for value in cycles.values()]
                times.append(trips * stage / L2 * 1e6)
                shared = (
                    STAGES[kernel] * stage
                    + 4 * SIDE * ({"forward": TAPS, "backward_features": 1, "backward_weight": 0}[kernel])
                )
                registers = listing.resources["REG"]
                resident = min(65536 // (SIDE * math.ceil(registers / 8) * 8), 227 * 1024 // (shared + 1024))
                cells = [total, counts["HMMA"], registers, listing.resources["STACK"], f"{shared / 1024:.1f}", resident]
                yield [kernel.replace("_", " "), channels, name, *cells, *(f"{value:.1f}" for value in times)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--listing", type=Path, help="output of `cuobjdump -res-usage -sass`, instead of compiling")
    add_save(parser)
    args = parser.parse_args()
    source = ROOT / "csrc/sps/cuda_tensor_core.cu"
    text = args.listing.read_text() if args.listing else disassemble(source, "sm_90")
    alignment = ("left", "right", "left", *["right"] * 10)
    lines = [
        "Compiled without a GPU: nothing here is measured.",
        "",
        "Least times of an H100 (132 multiprocessors, 1.755 GHz) for 40,000 cells, C channels in and out, 3 x 3 taps.",
        "Issue: all instructions of the loop over chunks, 128 bytes of each row, 64 in the gradient of the kernel.",
        "Tensor: the dense peak; `mma.sync` is said to reach about 60 % of it on this GPU. Shared: 128 bytes a clock.",
        "L2: 5.5 TB/s, if nothing is found in L1, where the rows of the forward pass that several taps read are kept.",
        f"The backward pass to features also adds {CELLS * TAPS * 128 * 4 / 1e6:.0f} MB atomically at C = 128.",
        "A stack: registers are spilled.",
        "",
        tabulate(rows(list(read_listings(text))), COLUMNS, tablefmt="pipe", disable_numparse=True, colalign=alignment),
    ]
    title = "Instructions of the sparse convolution on tensor cores"
    show_page(title, "benchmarks/sps_instructions.py", "\n".join(lines), args.save)


if __name__ == "__main__":
    main()
