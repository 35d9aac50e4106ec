"""The counting of a kernel's instructions: on a listing that is counted by hand, and on a kernel that nvcc compiles."""

import shutil
import sys
from pathlib import Path

import pytest
from tool_loader import load_tool

tool = load_tool("count_instructions", "benchmarks")

# Two samples an iteration of the inner loop, which has 11 instructions; one of them is not on the shortest way, and two
# of the loads are not on another. Around it 6 instructions, and a loop for samples that are left over.
LISTING = Path(__file__).with_name("listing.txt")

KERNEL = """
template <int kCount>
__global__ void multiply(float* numbers, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 32) {
    float number = numbers[i];
#pragma unroll
    for (int k = 0; k < kCount; ++k) number = number * number + 1.0f;
    numbers[i] = number;
  }
}
template __global__ void multiply<10>(float*, int);
template __global__ void multiply<50>(float*, int);
"""


def make_kernel(**changes) -> "tool.Kernel":
    settings = {"label": "x", "pattern": "forward", "mark": r"LDG\.E\.128", "marks": 2, "lanes": 8, "prepared": 4}
    return tool.Kernel(**(settings | changes))


def test_count_of_a_listing() -> None:
    (listing,) = tool.read_listings(LISTING.read_text())
    assert listing.resources["REG"] == 40 and listing.resources["STACK"] == 8
    assert len(listing.instructions) == 24
    counted = tool.count(make_kernel(), listing.instructions)
    assert counted == tool.Count(loop=10 / 2, preparation=6 / 4)
    with pytest.raises(ValueError, match="no loop has RED in x"):
        tool.count(make_kernel(mark="RED"), listing.instructions)


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(tool.OPERATORS, "msda", (LISTING, [make_kernel(label="forward, float32", samples=10**9)]))
    monkeypatch.setattr(sys, "argv", ["x", "--operators", "msda", "--listing", str(LISTING)])
    tool.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| forward, float32"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[1]) == 5
    time = (float(cells[1]) + float(cells[2])) * 10**9 * 8 / 32 / (132 * 4 * 1.755e9) * 1e6
    assert float(cells[3]) == pytest.approx(time, abs=0.6)
    assert cells[4:] == ["40", "8", "1024"]
    monkeypatch.setitem(tool.OPERATORS, "msda", (LISTING, [make_kernel(pattern="backward")]))
    with pytest.raises(ValueError, match="no kernel whose name matches backward"):
        tool.main()


@pytest.mark.skipif(
    shutil.which("nvcc", path="/usr/local/cuda/bin") is None and shutil.which("nvcc") is None, reason="there is no nvcc"
)
def test_count_of_a_compiled_kernel(tmp_path: Path) -> None:
    source = tmp_path / "multiply.cu"
    source.write_text(KERNEL)
    listings = list(tool.read_listings(tool.disassemble(source, "sm_90")))
    loops = {}
    for factors in (10, 50):
        kernel = make_kernel(pattern=f"ILi{factors}E", mark=r"STG", marks=1, prepared=0)
        (listing,) = [listing for listing in listings if kernel.pattern in listing.name]
        loops[factors] = tool.count(kernel, listing.instructions).loop
    assert loops[50] - loops[10] == 40  # one multiply-add each
    assert 10 < loops[10] < 20
