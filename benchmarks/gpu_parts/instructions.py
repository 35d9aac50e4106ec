"""The machine code of CUDA kernels, without a GPU: nvcc compiles, cuobjdump disassembles; ways through its loops."""

import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACCESS = 1 << 16  # what another access to memory counts among marks


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
