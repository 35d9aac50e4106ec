"""Arguments that do not fit: the same error from the kernels, the PyTorch form and the fake kernels."""

import pytest
import torch

from querymask.common.ops import (
    deformable_sparse_conv2d,
    multi_dilation_sparse_conv2d,
    sparse_conv2d,
    sparse_conv2d_reference,
)


def fake(*arguments):
    """The call as ``torch.compile`` and ``torch.export`` see it."""
    return sparse_conv2d(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))


def deformable(features, index_map, cells, weight, bias, dilation):
    taps = weight.shape[2] * weight.shape[3] if weight.dim() == 4 else 9
    return deformable_sparse_conv2d(
        features, index_map, cells, torch.zeros(len(cells), taps, 2), weight, bias, dilation
    )


EAGER = [sparse_conv2d, sparse_conv2d_reference, deformable]
FORMS = pytest.mark.parametrize("form", [*EAGER, fake], ids=["op", "reference", "deformable", "fake"])

# of make_sps_inputs: features [30, 4], index_map [2, 5, 7], cells [23, 3], weight [3, 4, 3, 3], bias [3]
BAD_VALUES = {
    "features": ({"features": torch.zeros(30)}, r"features must be \[N, C_in\], got shape \[30\]"),
    "index_map": ({"index_map": torch.zeros(5, 7).int()}, r"index_map must be \[R, H, W\], got shape \[5, 7\]"),
    "cells": ({"cells": torch.zeros(23, 2).int()}, r"cells must be \[N_A, 3\] \(region, y, x\), got shape \[23, 2\]"),
    "flat cells": ({"cells": torch.zeros(69).int()}, r"cells must be \[N_A, 3\] \(region, y, x\), got shape \[69\]"),
    "weight": ({"weight": torch.zeros(3, 36)}, r"weight must be \[C_out, C_in, kH, kW\], got shape \[3, 36\]"),
    "channels": (
        {"weight": torch.zeros(3, 5, 3, 3)},
        r"weight \[C_out, C_in, kH, kW\] has shape \[3, 5, 3, 3\] but features have C_in = 4",
    ),
    "even kernel": ({"weight": torch.zeros(3, 4, 3, 2)}, r"weight has a kernel of 3 x 2: both must be odd, so that"),
    "empty kernel": ({"weight": torch.zeros(3, 4, 0, 3)}, r"weight has a kernel of 0 x 3: both must be odd, so that"),
    "bias": ({"bias": torch.zeros(4)}, r"bias must be \[C_out\] = \[3\] or None, got shape \[4\]"),
    "wide bias": ({"bias": torch.zeros(1, 3)}, r"bias must be \[C_out\] = \[3\] or None, got shape \[1, 3\]"),
    "no dilation": ({"dilation": (0, 1)}, r"dilation must be two positive numbers \(vertical, .*, got \[0, 1\]"),
    "negative": ({"dilation": -1}, r"dilation must be two positive numbers \(vertical, .*, got \[-1, -1\]"),
    "dilations": ({"dilation": (1, 2, 3)}, r"dilation must be two positive numbers \(vertical, .*, got \[1, 2, 3\]"),
    "no branch": ({"dilation": ()}, r"dilation must be two positive numbers \(vertical, .* for each branch, got \[\]"),
    "second": ({"dilation": (1, 1, 2, 0)}, r"dilation must be two positive numbers .*, got \[1, 1, 2, 0\]"),
    "shares": (
        {"dilation": (1, 1, 2, 2)},
        r"the 2 branches of dilation \[1, 1, 2, 2\] must have equal shares of weight's C_out = 3",
    ),
}

BAD_TYPES = {
    "integers": ({"features": torch.zeros(30, 4).int()}, "features must be float16, bfloat16, float32 or float64, got"),
    "real map": ({"index_map": torch.zeros(2, 5, 7)}, "index_map must be int32 or int64, got"),
    "short map": ({"index_map": torch.zeros(2, 5, 7).short()}, "index_map must be int32 or int64, got"),
    "real cells": ({"cells": torch.zeros(23, 3)}, "cells must be int32 or int64, got"),
    "weight": ({"weight": torch.zeros(3, 4, 3, 3).half()}, "weight and bias must have features' type .* convert them"),
    "bias": ({"bias": torch.zeros(3).double()}, "weight and bias must have features' type .* convert them with .to"),
}


@FORMS
@pytest.mark.parametrize("case", BAD_VALUES)
def test_value_errors(form, case, make_sps_inputs):
    replaced, message = BAD_VALUES[case]
    with pytest.raises(ValueError, match=message):
        form(*make_sps_inputs(dtype=torch.float32)._replace(**replaced))


@FORMS
@pytest.mark.parametrize("case", BAD_TYPES)
def test_type_errors(form, case, make_sps_inputs):
    replaced, message = BAD_TYPES[case]
    with pytest.raises(TypeError, match=message):
        form(*make_sps_inputs(dtype=torch.float32)._replace(**replaced))


@pytest.mark.parametrize("form", EAGER, ids=["op", "reference", "deformable"])
@pytest.mark.parametrize("moved", ["index_map", "cells", "weight", "bias"])
def test_two_devices(form, moved, make_sps_inputs):
    inputs = make_sps_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=f"all tensors must be on one device, got features on cpu, .*{moved} on meta"):
        form(*inputs._replace(**{moved: getattr(inputs, moved).to("meta")}))


@pytest.mark.parametrize("form", EAGER, ids=["op", "reference", "deformable"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cell", [(2, 0, 0), (0, 5, 0), (0, 0, 7), (-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_cell_outside_of_the_map(form, cell, index_dtype, make_sps_inputs):
    inputs = make_sps_inputs(dtype=torch.float32, index_dtype=index_dtype)
    inputs.cells[6] = torch.tensor(cell)
    text = r"cells\[6\] \(region, y, x\) = \({}, {}, {}\) is outside of index_map \[R, H, W\] = \[2, 5, 7\]".format(
        *cell
    )
    with pytest.raises(IndexError, match=text):
        form(*inputs)


@pytest.mark.parametrize("form", EAGER, ids=["op", "reference", "deformable"])
@pytest.mark.parametrize("row", [-1, 30])
def test_row_out_of_range(form, row, make_sps_inputs):
    inputs = make_sps_inputs(dtype=torch.float32)
    inputs.cells[0] = torch.tensor([1, 2, 3])
    inputs.index_map[1, 3, 2] = row
    with pytest.raises(IndexError, match=rf"index_map\[1, 3, 2\] = {row} is not one of the 30 rows of features"):
        form(*inputs)


def test_indices_in_the_backward_pass(make_sps_inputs):
    """The operator stands alone: it does not trust that the forward pass has checked."""
    inputs = make_sps_inputs(dtype=torch.float32)
    inputs.cells[6] = 99
    with pytest.raises(IndexError, match=r"cells\[6\]"):
        features, index_map, cells, weight, _, dilation = inputs.flat
        torch.ops.querymask.sparse_conv2d_backward(torch.zeros(23, 3), features, index_map, cells, weight, dilation)


def test_no_features(make_sps_inputs):
    inputs = make_sps_inputs(rows=0)
    for form in EAGER:
        with pytest.raises(IndexError, match="is not one of the 0 rows of features"):
            form(*inputs)


@pytest.mark.parametrize("device_of_call", ["cpu", "meta"])
def test_grad_output(device_of_call, make_sps_inputs):
    features, index_map, cells, weight, _, dilation = make_sps_inputs(device=device_of_call).flat
    backward = torch.ops.querymask.sparse_conv2d_backward
    grad = torch.zeros(23, 3, dtype=torch.float64, device=device_of_call)
    with pytest.raises(ValueError, match=r"grad_output must be \[N_A, C_out\] = \[23, 3\], got shape \[22, 3\]"):
        backward(grad[:22], features, index_map, cells, weight, dilation)
    with pytest.raises(TypeError, match="grad_output must have features' type"):
        backward(grad.float(), features, index_map, cells, weight, dilation)


def test_branches_that_do_not_fit(make_sps_inputs):
    inputs = make_sps_inputs()
    with pytest.raises(ValueError, match="one entry for each of one or more branches, got 0, 0 and 0"):
        multi_dilation_sparse_conv2d(*inputs[:3], [], [], [])
    with pytest.raises(ValueError, match="one entry for each of one or more branches, got 2, 1 and 2"):
        multi_dilation_sparse_conv2d(*inputs[:3], [inputs.weight] * 2, [inputs.bias], [1, 3])
    shapes = r"\[\(3, 4, 3, 3\), \(2, 4, 3, 3\)\]"
    with pytest.raises(ValueError, match=f"the weights of all branches must have one shape, got {shapes}"):
        multi_dilation_sparse_conv2d(
            *inputs[:3], [inputs.weight, inputs.weight[:2]], [inputs.bias, inputs.bias[:2]], [1, 3]
        )


def test_offsets(make_sps_inputs):
    inputs = make_sps_inputs()
    with pytest.raises(ValueError, match=r"offsets must be \[N_A, kH\*kW, 2\] = \[23, 9, 2\], got shape \[23, 18\]"):
        deformable_sparse_conv2d(*inputs[:3], torch.zeros(23, 18), *inputs[3:])
    with pytest.raises(TypeError, match="offsets must be float32 or float64, got .* compute the offsets in float32"):
        deformable_sparse_conv2d(*inputs[:3], torch.zeros(23, 9, 2).half(), *inputs[3:])
    with pytest.raises(ValueError, match="offsets must be on features' device cpu, got meta"):
        deformable_sparse_conv2d(*inputs[:3], torch.zeros(23, 9, 2, device="meta"), *inputs[3:])
    with pytest.raises(ValueError, match=r"has one branch: dilation must be two numbers, got \[1, 1, 1, 1, 2, 2\]"):
        deformable_sparse_conv2d(*inputs[:3], torch.zeros(23, 9, 2), *inputs[3:5], (1, 1, 1, 1, 2, 2))
