"""Parameters, FLOPs and activations of a Detectron2 model, counted with fvcore.

fvcore's conventions: one multiply-add is one FLOP; activations are the sizes of the outputs of convolutions and matrix
products. Detectron2's own ``detectron2.utils.analysis`` does the same but cannot be imported everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import Handle, elementwise_flop_counter, generic_activation_jit, get_shape
from torch import Tensor, nn

from querymask.common.masks import Bands
from querymask.common.ops import fvcore_handles
from querymask.common.predictions import Predictions


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a module, shared ones counted once; buffers (such as frozen batch norms) are none."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs.

    Attributes:
        flops_by_operator, flops_by_module: multiply-adds; the module "" is the whole model.
        activations_by_module: numbers.
        uncounted: operators without a formula, with their number of calls.
    """

    flops_by_operator: Mapping[str, float]
    flops_by_module: Mapping[str, float]
    activations_by_module: Mapping[str, float]
    uncounted: Mapping[str, int]


def count_parameters(model: nn.Module) -> dict[str, Parameters]:
    """The parameters of every module by its name; the name of the model itself is ""."""

    def count(module: nn.Module) -> Parameters:
        parameters = list(module.parameters())
        return Parameters(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))

    return {name: count(module) for name, module in model.named_modules()}


def measure(model: nn.Module, item: Mapping[str, Any]) -> Cost:
    """Count the cost of inference on one image; the model is put into evaluation mode for it.

    Args:
        model: a Detectron2 model, on any device.
        item: its input for one image: ``image`` (3, H, W), and ``height``, ``width`` of the result if they differ.
    """
    wrapper = _TensorsOnly(model, item)
    training = model.training
    model.eval()
    flops = count_flops(wrapper, (item["image"],))
    activations = _silent(ActivationCountAnalysis(wrapper, (item["image"],)).set_op_handle(**activation_handles()))
    with torch.no_grad():
        for analysis in (flops, activations):
            analysis.total()
    model.train(training)
    by_module = _of_model(flops.by_module()), _of_model(activations.by_module())
    return Cost(flops.by_operator(), *by_module, flops.unsupported_ops())


def count_flops(module: nn.Module, inputs: tuple[Tensor, ...]) -> FlopCountAnalysis:
    """fvcore's count for any module of tensors, with the formulas that it lacks."""
    return _silent(FlopCountAnalysis(module, inputs).set_op_handle(**flop_handles()))


def _silent(analysis: JitModelAnalysis) -> JitModelAnalysis:
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def _of_model(counts: Mapping[str, float]) -> dict[str, float]:
    """Counts by module of the wrapper, as those of the model in it."""
    return {name[len("model.") :]: count for name, count in counts.items() if name.startswith("model")}


class _TensorsOnly(nn.Module):
    """A model as the tracer wants it: an image tensor in, tensors out."""

    def __init__(self, model: nn.Module, item: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.item = dict(item)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with _bases_of_segments(self.model) as bases:
            outputs = self.model([{**self.item, "image": image}])
        return (*_tensors(outputs), *bases)


@contextmanager
def _bases_of_segments(model: nn.Module) -> Iterator[list[Tensor]]:
    """What a panoptic map is made of, filled by a call inside; the tracer leaves out what no output depends on.

    A map without segments depends on nothing, and random weights give such maps.
    """
    bases: list[Tensor] = []
    if getattr(model, "panoptic", None) is None:
        yield bases
        return
    branch = model.mask_branch
    make = branch.bands

    def bands(found: Predictions, *args: Any) -> Bands:
        band = make(found, *args)
        bases.extend((found.logits, band(torch.zeros(1, dtype=torch.int64), 0, found.canvas.size[0])))
        return band

    branch.bands = bands
    try:
        yield bases
    finally:
        del branch.bands


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in the output of a Detectron2 model."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Boxes):
        yield output.tensor
    elif isinstance(output, Instances):
        yield from _tensors(output.get_fields())
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


# ---- Formulas -----------------------------------------------------------------------------------------------------

# Operators that fvcore does not know to move, compare or select without arithmetic
_FREE = """
    pad fill_ zero_ clone repeat repeat_interleave flip tile meshgrid numpy_T movedim view_as unfold
    empty_like ones_like new_ones scalar_tensor tensor lift_fresh
    topk sort argsort argmax min amin amax minimum maximum where masked_fill_ ceil round
    ne lt le __or__ logical_not logical_and logical_or any all isfinite
""".split()


def flop_handles() -> dict[str, Handle | None]:
    """FLOP formulas of the operators that fvcore lacks, ours included; None for those without arithmetic."""
    return {
        **{f"aten::{name}": None for name in _FREE},
        "aten::scaled_dot_product_attention": _attention_flops,
        "aten::baddbmm": _baddbmm_flops,
        "aten::upsample_bicubic2d": elementwise_flop_counter(0, 16),
        "aten::embedding_bag": _bilinear_flops,
        **fvcore_handles(),
    }


def _bilinear_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of the sums of four rows that bilinear reads of points are, as many as fvcore counts for ``grid_sample``.

    The longer sums, which are RoIAlign's, count as nothing: fvcore does not count torchvision's ``roi_align`` either.
    """
    (rows,), (bags, channels) = get_shape(inputs[1]), get_shape(outputs[0])
    return 4 * bags * channels if rows == 4 * bags else 0


def activation_handles() -> dict[str, Handle]:
    """Formulas of the activations of the operators that fvcore lacks, ours included."""
    names = ("aten::scaled_dot_product_attention", "aten::baddbmm", "aten::mm", *fvcore_handles())
    return dict.fromkeys(names, generic_activation_jit())


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores and weighted sums: query (..., Q, D), key (..., K, D), value (..., K, E)."""
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _baddbmm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Added term, then (B, N, K) times (B, K, M)."""
    left, right = get_shape(inputs[1]), get_shape(inputs[2])
    return prod(left) * right[-1]
