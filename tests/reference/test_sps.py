"""Structure-preserving sparsity against its official implementation: splits, refinements and convolutions."""

import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases, load_document
from torch import Tensor

from querymask.common.ops import sparse_conv2d, sparse_conv2d_reference
from querymask.common.sps import SparseMap, keep_highest

CASES = load_cases("sps")
FORMS = (sparse_conv2d, sparse_conv2d_reference)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TOLERANCE = 1e-10

SETTINGS = {"kind", "file", "rois", "channels", "side", "steps", "out_channels", "conv5x5", "arrays"}
DOCUMENT = {"precision", "input", "procedure", "convolutions", "arrays"}


def check_settings(name: str, case: dict[str, Any], arrays: set[str]) -> None:
    """A setting or an array that is not understood fails the test, by name."""
    assert not (unknown := set(load_document("sps")["general"]) - DOCUMENT), f"unknown conventions: {unknown}"
    assert not (unknown := set(case) - SETTINGS), f"case {name!r} has unknown settings: {unknown}"
    assert case.get("kind", "component") == "component", f"case {name!r} is of unknown kind {case['kind']!r}"
    known = r"step\d+_(scores|mask|active|passive|(split|up)_(index_map|roi|xy|num_active|num_passive|active|passive))"
    known += r"|conv(\d+|5x5)_(out|grad_active|grad_passive|grad_weight|grad_bias)"
    assert not (unknown := {key for key in arrays if not re.fullmatch(known, key)}), f"unknown arrays: {unknown}"


def random_input(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape))


class Expected:
    """The arrays of a case, which remembers those that were compared."""

    def __init__(self, arrays: Any):
        self.arrays, self.compared = arrays, set()

    def compare(self, actual: Tensor | int, name: str) -> None:
        if name in self.arrays:
            actual = actual.detach().cpu() if isinstance(actual, Tensor) else actual
            assert_close(actual, self.arrays[name], name, TOLERANCE)
            self.compared.add(name)


def build(prefix: str, case: dict[str, Any], expected: Expected, device: str) -> SparseMap:
    """The map after the last step of a case, compared after every step."""
    dense = random_input(f"{prefix}.map", case["rois"], case["channels"], case["side"], case["side"])
    sparse = SparseMap.from_dense(dense.to(device))
    for step in range(case["steps"]):
        keep = torch.from_numpy(expected.arrays[f"step{step}_mask"]).to(device)
        scores = torch.from_numpy(expected.arrays[f"step{step}_scores"]).to(device)
        expected.compare(keep_highest(scores, int(keep.sum())), f"step{step}_mask")
        expected.compared.add(f"step{step}_scores")
        for stage in ("split", "up"):
            sparse = sparse.split(keep) if stage == "split" else sparse.upsample()
            region, y, x = sparse.cells.unbind(1)
            values = {"index_map": sparse.index_map, "roi": region, "xy": torch.stack([x, y], 1)}
            values |= {"num_active": len(sparse.active), "num_passive": len(sparse.passive)}
            values |= {"active": sparse.active, "passive": sparse.passive}
            for key, value in values.items():
                expected.compare(value, f"step{step}_{stage}_{key}")
        child = random_input(f"{prefix}.child{step}", *sparse.active.shape).to(device)
        sparse = sparse.replace_active(sparse.active + child)
        expected.compare(sparse.active, f"step{step}_active")
        expected.compare(sparse.passive, f"step{step}_passive")
    return sparse


def kernel_of(conv: str, case: dict[str, Any]) -> tuple[int, int, bool]:
    """Size, dilation and whether it has a bias."""
    if conv != "5x5":
        return 3, int(conv), True
    found = re.fullmatch(r"kernel (\d+), dilation (\d+), (no|with) bias", case["conv5x5"])
    assert found, f"unknown setting conv5x5: {case['conv5x5']!r}"
    return int(found[1]), int(found[2]), found[3] == "with"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS, ids=["op", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_sps(name: str, form: Callable[..., Tensor], device: str) -> None:
    case = CASES[name]
    arrays = load_arrays("sps", case)
    check_settings(name, case, set(arrays))
    expected, prefix = Expected(arrays), f"sps.{name}"
    sparse = build(prefix, case, expected, device)
    for conv in sorted(key[4:-4] for key in arrays if key.startswith("conv") and key.endswith("_out")):
        size, dilation, has_bias = kernel_of(conv, case)
        outputs, columns = case["out_channels"], size * size * case["channels"]
        matrix = torch.from_numpy(fixture().weight(f"{prefix}.conv{conv}.weight", (outputs, columns))).to(device)
        bias = torch.from_numpy(fixture().weight(f"{prefix}.conv{conv}.bias", (outputs,))).to(device)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (sparse.active, sparse.passive, matrix, bias)]
        active, passive, matrix, bias = leaves
        weight = matrix.view(outputs, size, size, -1).permute(0, 3, 1, 2)
        output = form(
            torch.cat([active, passive]), sparse.index_map, sparse.cells, weight, bias if has_bias else None, dilation
        )
        output.backward(random_input(f"{prefix}.grad{conv}", *output.shape).to(device))
        expected.compare(output, f"conv{conv}_out")
        for key, leaf in zip(("active", "passive", "weight", "bias"), leaves):
            if leaf.grad is not None:
                expected.compare(leaf.grad, f"conv{conv}_grad_{key}")
    assert not (left := set(arrays) - expected.compared), (
        f"case {name!r} has arrays that nothing is compared to: {left}"
    )


def test_settings_that_are_not_known() -> None:
    """They fail by name, and so do arrays."""
    if not CASES:
        pytest.skip("the folder has no cases of sps")
    name, case = next(iter(CASES.items()))
    with pytest.raises(AssertionError, match="unknown settings: {'stride'}"):
        check_settings(name, case | {"stride": 2}, set())
    with pytest.raises(AssertionError, match="unknown arrays: {'conv3_grad_offset'}"):
        check_settings(name, case, {"conv3_out", "conv3_grad_offset"})
    with pytest.raises(AssertionError, match="unknown setting conv5x5: 'kernel 7'"):
        kernel_of("5x5", case | {"conv5x5": "kernel 7"})
