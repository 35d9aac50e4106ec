"""Arguments that do not fit: the same error from the kernels, the PyTorch form and the fake kernels."""

import pytest
import torch

from querymask.common.ops import multi_scale_deformable_attention, multi_scale_deformable_attention_reference

BACKWARD = "multi_scale_deformable_attention_backward"


def fake(value, spatial_shapes, sampling_locations, attention_weights):
    """The call as ``torch.compile`` and ``torch.export`` see it."""
    tensors = [tensor.to("meta") for tensor in (value, sampling_locations, attention_weights)]
    return multi_scale_deformable_attention(tensors[0], spatial_shapes, *tensors[1:])


FORMS = pytest.mark.parametrize(
    "form",
    [multi_scale_deformable_attention, multi_scale_deformable_attention_reference, fake],
    ids=["op", "reference", "fake"],
)

VALUE, LOCATIONS, WEIGHTS = (2, 39, 3, 7), (2, 5, 3, 3, 2, 2), (2, 5, 3, 3, 2)  # of make_msda_inputs

BAD_VALUES = {
    "value": ({"value": torch.zeros(2, 39, 21)}, r"value must be \[B, S, M, D\], got shape \[2, 39, 21\]"),
    "tokens": ({"value": torch.zeros(2, 40, 3, 7)}, r"value has 40 tokens but spatial_shapes .* add up to 39: give"),
    "levels": ({"spatial_shapes": [(5, 4), (19, 1)]}, r"sampling_locations .* and spatial_shapes have L = 2"),
    "no levels": ({"spatial_shapes": []}, r"for each of one or more levels, got \[\]"),
    "empty level": ({"spatial_shapes": [(5, 4), (19, 1), (0, 3)]}, r"level 2 of spatial_shapes is 0 x 3: both"),
    "negative": ({"spatial_shapes": [(-5, -4), (18, 1), (1, 1)]}, r"level 0 of spatial_shapes is -5 x -4: both"),
    "odd shapes": ({"spatial_shapes": [(5, 4), (3, 6), (1,)]}, r"a height and a width for each .*, got \[5, 4,"),
    "points": ({"sampling_locations": torch.zeros(WEIGHTS)}, r"sampling_locations must be \[B, Q, M, L, P, 2\], got"),
    "coordinates": ({"sampling_locations": torch.zeros(*WEIGHTS, 3)}, r"must be \[B, Q, M, L, P, 2\], got"),
    "batch": (
        {"sampling_locations": torch.zeros(LOCATIONS)[:1]},
        r"has shape \[1, 5, 3, 3, 2, 2\] but value has B = 2",
    ),
    "heads": ({"sampling_locations": torch.zeros(LOCATIONS)[:, :, :2]}, r"has shape \[2, 5, 2, 3, 2, 2\] .* M = 3"),
    "weights": (
        {"attention_weights": torch.zeros(2, 5, 3, 6)},
        r"attention_weights must have .*\[2, 5, 3, 3, 2\], got",
    ),
    "other queries": ({"attention_weights": torch.zeros(WEIGHTS)[:, :4]}, r"got \[2, 4, 3, 3, 2\]"),
}

BAD_TYPES = {
    "integers": ({"value": torch.zeros(VALUE).int()}, "value must be float16, bfloat16, float32 or float64, got"),
    "complex": ({"value": torch.zeros(VALUE) * 1j}, "value must be float16, bfloat16, float32 or float64, got"),
    "half locations": ({"sampling_locations": torch.zeros(LOCATIONS).half()}, "compute the locations in float32"),
    "integer locations": ({"sampling_locations": torch.zeros(LOCATIONS).long()}, "must be float32 or float64, got"),
    "other weights": ({"attention_weights": torch.zeros(WEIGHTS).double()}, "must have value's type .* convert one"),
}


def call(form, make_msda_inputs, replaced):
    inputs = make_msda_inputs(dtype=torch.float32)
    return form(*inputs._replace(**replaced))


@FORMS
@pytest.mark.parametrize("case", BAD_VALUES)
def test_value_errors(form, case, make_msda_inputs):
    replaced, message = BAD_VALUES[case]
    with pytest.raises(ValueError, match=message):
        call(form, make_msda_inputs, replaced)


@FORMS
@pytest.mark.parametrize("case", BAD_TYPES)
def test_type_errors(form, case, make_msda_inputs):
    replaced, message = BAD_TYPES[case]
    with pytest.raises(TypeError, match=message):
        call(form, make_msda_inputs, replaced)


@FORMS
def test_spatial_shapes_in_a_tensor(form, make_msda_inputs):
    with pytest.raises(TypeError, match="got a tensor: use"):
        call(form, make_msda_inputs, {"spatial_shapes": torch.tensor([[5, 4], [3, 6], [1, 1]])})


@pytest.mark.parametrize(
    "form", [multi_scale_deformable_attention, multi_scale_deformable_attention_reference], ids=["op", "reference"]
)
@pytest.mark.parametrize("moved", ["value", "sampling_locations", "attention_weights"])
def test_two_devices(form, moved, device, make_msda_inputs):
    inputs = make_msda_inputs(device=device)
    elsewhere = "meta" if device == "cpu" else "cpu"
    with pytest.raises(ValueError, match="all tensors must be on one device, got value on"):
        form(*inputs._replace(**{moved: getattr(inputs, moved).to(elsewhere)}))


@pytest.mark.parametrize("device_of_call", ["cpu", "meta"])
def test_grad_output(device_of_call, make_msda_inputs):
    inputs = make_msda_inputs(device=device_of_call)
    backward = getattr(torch.ops.querymask, BACKWARD)
    grad = torch.zeros(2, 5, 21, dtype=torch.float64, device=device_of_call)
    with pytest.raises(
        ValueError, match=r"grad_output must be \[B, Q, M \* D\] = \[2, 5, 21\], got shape \[2, 5, 20\]"
    ):
        backward(grad[..., :20], *inputs.flat)
    with pytest.raises(TypeError, match="grad_output must have value's type"):
        backward(grad.float(), *inputs.flat)


def test_level_too_large(make_msda_inputs):
    """Its rows and columns would not fit into 32 bits."""
    with pytest.raises(ValueError, match="level 0 of spatial_shapes is 1 x 2147483648: too large"):
        torch.ops.querymask.multi_scale_deformable_attention(
            torch.zeros(1, 1, 1, 1).expand(1, 2**31, 1, 1),
            [1, 2**31],
            torch.zeros(1, 1, 1, 1, 1, 2),
            torch.zeros(1, 1, 1, 1, 1),
        )
