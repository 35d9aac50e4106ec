"""Multi-scale deformable attention in pure PyTorch: the fall-back, the documentation and the oracle of the kernels.

Shape letters: B batch, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from querymask.common.ops.autocast import autocast_type, cast

VALUE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flatten_shapes(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    """[(h0, w0), (h1, w1), ...] as [h0, w0, h1, w1, ...].

    Raises:
        TypeError: for a tensor.
    """
    if isinstance(spatial_shapes, Tensor):
        raise TypeError(
            "spatial_shapes must be a sequence of (height, width) in Python ints, got a tensor: "
            "use [feature.shape[-2:] for feature in features]"
        )
    # torch.jit's tracer makes tensors of the sizes that a model reads; torch.compile's symbols stay what they are.
    return [int(size) if isinstance(size, Tensor) else size for shape in spatial_shapes for size in shape]


def check_inputs(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    """Raises ValueError or TypeError unless the arguments fit together. csrc/msda/check.cpp has the same texts."""
    if value.dim() != 4:
        raise ValueError(f"value must be [B, S, M, D], got shape {list(value.shape)}")
    if sampling_locations.dim() != 6 or sampling_locations.shape[5] != 2:
        raise ValueError(f"sampling_locations must be [B, Q, M, L, P, 2], got shape {list(sampling_locations.shape)}")
    if len(spatial_shapes) % 2 != 0 or not spatial_shapes:
        raise ValueError(
            f"spatial_shapes must hold a height and a width for each of one or more levels, got {list(spatial_shapes)}"
        )
    sizes = list(
        zip(
            spatial_shapes[::2],
            spatial_shapes[1::2],
        )
    )
    for level, (height, width) in enumerate(sizes):
        if height <= 0 or width <= 0:
            raise ValueError(f"level {level} of spatial_shapes is {height} x {width}: both must be positive")
    batch, tokens, heads, _ = value.shape
    if (total := sum(height * width for height, width in sizes)) != tokens:
        raise ValueError(
            f"value has {tokens} tokens but spatial_shapes {list(spatial_shapes)} add up to {total}: "
            "give the shapes of the levels that were concatenated into value"
        )
    locations_shape = list(sampling_locations.shape)
    if [locations_shape[i] for i in (0, 2, 3)] != [batch, heads, len(sizes)]:
        raise ValueError(
            f"sampling_locations [B, Q, M, L, P, 2] has shape {locations_shape} but value has B = {batch} and "
            f"M = {heads}, and spatial_shapes have L = {len(sizes)}"
        )
    if list(attention_weights.shape) != locations_shape[:5]:
        raise ValueError(
            "attention_weights must have the shape of sampling_locations without its last dimension, "
            f"{locations_shape[:5]}, got {list(attention_weights.shape)}"
        )
    if not value.device == sampling_locations.device == attention_weights.device:
        raise ValueError(
            f"all tensors must be on one device, got value on {value.device}, sampling_locations on "
            f"{sampling_locations.device}, attention_weights on {attention_weights.device}"
        )
    if value.dtype not in VALUE_TYPES:
        raise TypeError(f"value must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if sampling_locations.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"sampling_locations must be float32 or float64, got {sampling_locations.dtype}: fewer digits displace "
            "the samples by a good part of a pixel; compute the locations in float32"
        )
    if attention_weights.dtype != value.dtype:
        raise TypeError(
            f"attention_weights must have value's type {value.dtype}, got {attention_weights.dtype}: "
            "convert one of them with .to()"
        )


def check_grad_output(grad_output: Tensor, value: Tensor, sampling_locations: Tensor) -> None:
    """The same for the gradient of the output."""
    batch, _, heads, channels = value.shape
    expected = [batch, sampling_locations.shape[1], heads * channels]
    if list(grad_output.shape) != expected:
        raise ValueError(f"grad_output must be [B, Q, M * D] = {expected}, got shape {list(grad_output.shape)}")
    if grad_output.device != value.device:
        raise ValueError(f"grad_output must be on value's device {value.device}, got {grad_output.device}")
    if grad_output.dtype != value.dtype:
        raise TypeError(f"grad_output must have value's type {value.dtype}, got {grad_output.dtype}")


def multi_scale_deformable_attention_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same as :func:`querymask.common.ops.multi_scale_deformable_attention`, composed of ``grid_sample``.

    float16 and bfloat16 are computed in float32, the result has value's type.
    """
    shapes = flatten_shapes(spatial_shapes)
    device = value.device.type
    if (dtype := autocast_type(device)) is not None:
        value, attention_weights = cast(value, dtype), cast(attention_weights, dtype)
        sampling_locations = cast(sampling_locations, torch.float32)
        with torch.autocast(device, enabled=False):
            return _compose(value, shapes, sampling_locations, attention_weights)
    return _compose(value, shapes, sampling_locations, attention_weights)


def _compose(value: Tensor, shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    check_inputs(value, shapes, sampling_locations, attention_weights)
    sizes = list(zip(shapes[::2], shapes[1::2]))
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    compute = torch.float64 if value.dtype == torch.float64 else torch.float32
    weights = attention_weights.to(compute).permute(3, 0, 2, 1, 4).flatten(1, 2)  # [L, B*M, Q, P]
    # A sample that is far outside, infinite or NaN meets only zeros; grid_sample itself would not survive the last two.
    near = ((sampling_locations > -1) & (sampling_locations < 2)).all(-1, keepdim=True)
    locations = torch.where(near, sampling_locations, -1).to(compute)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, B*M, Q, P, 2], (-1, -1) upper left

    output = value.new_zeros(batch * heads, channels, queries, dtype=compute)
    levels = value.to(compute).split([height * width for height, width in sizes], dim=1)
    for tokens, (height, width), grid, weight in zip(levels, sizes, grids, weights, strict=True):
        level = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples = grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (samples * weight.unsqueeze(1)).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)
