"""The arithmetic of the table of the sparse convolution's instructions."""

import re
import sys

import pytest
from tool_loader import ROOT, load_tool

tool = load_tool("sps_instructions", "benchmarks")


def test_constants_are_the_kernels():
    source = (ROOT / "csrc/sps/cuda_tensor_core.cu").read_text()
    constants = dict(re.findall(r"constexpr \w+ (k\w+) = (\d+);", source))
    expected = {
        "kSide": tool.SIDE,
        "kStages": tool.STAGES["forward"],
        "kWeightStages": tool.STAGES["backward_weight"],
        "kWantedBlocks": tool.WANTED_BLOCKS,
        "kThreads": 32 * tool.WARPS,
        "kDepth": tool.STAGE_ROW["forward"] // 16,
        "kWeightDepth": tool.STAGE_ROW["backward_weight"] // 16,
    }
    assert {name: int(constants[name]) for name in expected} == expected
    for table in (tool.STAGES, tool.STAGE_ROW):
        assert table["backward_features"] == table["forward"]


@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize("size", [2, 4])
def test_work(channels, size):
    """All multiply-adds are done, and beyond widths and depths that do not fill a tile few that are not wanted."""
    wanted = tool.CELLS * tool.TAPS * channels**2
    for kernel in tool.KERNELS:
        load = tool.work(kernel, channels, size)
        done = load.tiles * load.chunks * load.rows * load.columns * tool.STAGE_ROW[kernel] // size
        if kernel == "forward":
            most = 1.0
        else:
            most = 1 + -tool.TAPS * channels % tool.SIDE / (tool.TAPS * channels)
        if kernel == "backward_features":
            most *= max(tool.STAGE_ROW[kernel] / (channels * size), 1)
        assert 1 <= done / wanted <= 1.12 * most


def test_count_loop():
    """Around the products, the smaller of two loops; what is never executed does not count."""
    lines = ["MOV R0, R1", "LDSM.16.M88.4 R4, [R0]", "@!PT LDS RZ, [RZ]", "HMMA.1688 R8", "@P0 IADD3 R0"]
    lines += ["@P1 BRA 0x0010", "MOV R3, R1", "@P0 BRA 0x0000", "EXIT"]
    instructions = [sys.modules[tool.Listing.__module__].Instruction(16 * i, line) for i, line in enumerate(lines)]
    assert tool.count_loop(tool.Listing("kernel", {}, instructions)) == {"LDSM": 1, "HMMA": 1, "IADD3": 1, "BRA": 1}
