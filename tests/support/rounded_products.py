"""How far mixed precision moves losses and detections, and how far it must.

What bfloat16 cannot avoid is the rounding of factors and results of products: linear layers, convolutions, attention
and the project's operators. :class:`RoundedProducts` makes a float64 network round these, and these alone. Choices
(the highest scores, matching, random points) are those of the exact network everywhere, as a single other choice would
hide all rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from querymask.common.processes import Processes
from querymask.common.set_criterion import SetDetector
from querymask.effseg.fqdet import criterion, suppression
from querymask.solq.detector import DeformableDETR

Results = dict[str, Tensor]

DETECTED = 4
"""Batches in which instances are detected; losses, of which there are few in a batch, are of all."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "querymask::sparse_conv2d"}
PRODUCTS |= {"aten::_scaled_dot_product_flash_attention_for_cpu", "querymask::multi_scale_deformable_attention"}
EXACT_ARGUMENTS = {"querymask::multi_scale_deformable_attention": {2}}  # the locations


def _round(x: Any) -> Any:
    return x.bfloat16().to(x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


class RoundedProducts(TorchDispatchMode):
    """Rounds factors and results of products to bfloat16 where autocast is enabled, whatever their type."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = [False]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().partition(".")[0]
        if not self.enabled[-1] or name not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        self.count += 1
        exact = EXACT_ARGUMENTS.get(name, ())
        args = tuple(x if i in exact else tree_map(_round, x) for i, x in enumerate(args))
        return tree_map(_round, func(*args, **(kwargs or {})))

    def follow_autocast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Round within ``torch.autocast`` only, as parts of the network switch it off."""
        enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

        def entered(context: torch.autocast) -> Any:
            self.enabled.append(context._enabled)
            return enter(context)

        def left(context: torch.autocast, *error: Any) -> Any:
            self.enabled.pop()
            return leave(context, *error)

        monkeypatch.setattr(torch.autocast, "__enter__", entered)
        monkeypatch.setattr(torch.autocast, "__exit__", left)


class Choices:
    """What a first run chooses, for further runs of the same network to choose as well."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.left: Iterator[Any] | None = None
        self.making = False  # a choice may be made of others

    def __call__(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, or gave in the first run."""
        if self.making:
            return make()
        if self.left is not None:
            return next(self.left)
        self.making = True
        self.made.append(make())
        self.making = False
        return self.made[-1]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Choose as before; all of it."""
        self.left = iter(self.made)
        yield
        assert next(self.left, None) is None, "the networks must choose equally often"
        self.left = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        topk = torch.Tensor.topk

        def choose(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
            indices = self(lambda: topk(x, k, dim, largest, sorted).indices)
            return torch.return_types.topk((x.gather(dim, indices), indices))

        monkeypatch.setattr(torch.Tensor, "topk", choose)
        for owner, name in (
            (SetDetector, "match"),
            (DeformableDETR, "match"),
            (Processes, "draw"),
            (suppression, "nms_within_classes"),
            (criterion, "rank_anchors"),
        ):
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args, original=original: self(lambda: original(*args)))


@torch.no_grad()
def run(model: nn.Module, batches: Sequence[list[dict[str, Any]]]) -> tuple[list[Results], list[dict[Any, Results]]]:
    """Losses of every batch by name; of the first batches' images detections by query and class: box, score, mask."""
    losses, found = [], []
    for batch in batches:
        losses.append({name: value.double() for name, value in model.train()(batch).items()})
    for batch in batches[:DETECTED]:
        for output in model.eval()(batch):
            instances = output["instances"]
            pairs = zip(instances.pred_queries.tolist(), instances.pred_classes.tolist())
            fields = {"scores": instances.scores.double()}
            if instances.has("pred_boxes"):
                fields["boxes"] = instances.pred_boxes.tensor.double()
            if instances.has("pred_masks"):
                fields["masks"] = instances.pred_masks.double()
            found.append({pair: {name: x[i] for name, x in fields.items()} for i, pair in enumerate(pairs)})
    return losses, found


def errors(results: tuple, exact: tuple) -> dict[str, float]:
    """Mean errors of losses relative to their size, of scores, of boxes in pixels, and the share of mask pixels that
    differ. Without the largest tenth: a choice that is not replayed (a region's level, say) makes errors of any size.
    """
    differences: dict[str, list[Tensor]] = {"losses": []}
    for name in exact[0][0]:
        values, truth = (torch.stack([batch[name] for batch in side[0]]) for side in (results, exact))
        differences["losses"].append((values - truth).abs() / truth.abs().mean())
    shared = 0
    for image, truth in zip(results[1], exact[1], strict=True):
        for pair in image.keys() & truth.keys():
            shared += 1
            for name, value in truth[pair].items():
                differences.setdefault(name, []).append((image[pair][name] - value).abs().flatten())
    assert shared > 0.8 * sum(map(len, exact[1])), "the networks must find the same"
    together = {name: torch.cat(parts) for name, parts in differences.items()}
    kept = {name: x if name == "masks" else x.sort().values[: int(0.9 * len(x))] for name, x in together.items()}
    return {name: float(x.mean()) for name, x in kept.items()}


def precision_errors(
    model: nn.Module, batches: Sequence[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> Mapping[str, tuple[float, float]]:
    """Errors (see ``errors``) under autocast to bfloat16, and those of the float64 network with rounded products.

    Args:
        model: in float32, without dropout.
        batches: model inputs with instances.
    """
    model.cpu()  # it is that processor's autocast and operators that are compared
    choices, rounding = Choices(), RoundedProducts()
    choices.install(monkeypatch)
    exact_model = deepcopy(model).double()
    exact = run(exact_model, batches)
    with choices.replayed(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(model, batches)
    rounding.follow_autocast(monkeypatch)
    with choices.replayed(), torch.autocast("cpu", dtype=torch.bfloat16), rounding:
        rounded = run(exact_model, batches)
    assert rounding.count > 0
    monkeypatch.undo()
    found, allowed = errors(mixed, exact), errors(rounded, exact)
    return {name: (found[name], allowed[name]) for name in found}


def check_precision(model: nn.Module, batches: Sequence[list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that no error under autocast is more than twice that of rounded products alone (``precision_errors``)."""
    errors = precision_errors(model, batches, monkeypatch)
    assert errors["losses"][0] > 0
    for name, (found, allowed) in errors.items():
        assert found <= 2 * allowed, f"{name}: {found}, where {allowed} is the error of rounded products"
