"""Multi-scale deformable attention against its official implementation, kernels and PyTorch form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_close, load_arrays, load_cases, load_document

from querymask.common.ops import multi_scale_deformable_attention, multi_scale_deformable_attention_reference

CASES = load_cases("msda")
FORMS = (multi_scale_deformable_attention, multi_scale_deformable_attention_reference)
INPUTS = ("value", "sampling_locations", "attention_weights")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("form", FORMS, ids=["op", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_msda(name: str, form: Callable[..., torch.Tensor], dtype: str, device: str) -> None:
    case: dict[str, Any] = CASES[name]
    arrays = load_arrays("msda", case)
    tolerance = load_document("msda")["tolerance"][dtype]
    inputs = {key: torch.tensor(arrays[key], dtype=getattr(torch, dtype), device=device) for key in INPUTS}
    for tensor in inputs.values():
        tensor.requires_grad_()
    grad_output = torch.tensor(arrays["grad_output"], dtype=getattr(torch, dtype), device=device)

    output = form(spatial_shapes=[(h, w) for h, w in case["spatial_shapes"]], **inputs)
    output.backward(grad_output)

    assert_close(output.detach().cpu(), arrays["output"], "output", tolerance)
    for key, tensor in inputs.items():
        assert_close(tensor.grad.cpu(), arrays[f"grad_{key}"], f"grad_{key}", tolerance)
