"""Optimiser with DETR's parameter groups, and the learning-rate schedule."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

NORM_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over the groups of :func:`parameter_groups`, with gradient clipping inside ``step``.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "full_model" clips the norm over all parameters together; "norm" and "value"
    are Detectron2's own and work on one tensor at a time.
    """
    name = cfg.SOLVER.OPTIMIZER
    groups = parameter_groups(cfg, model)
    if name == "ADAMW":
        # On CPU the fused step is one call for a whole group instead of a dozen for every tensor.
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        optimizer_type, arguments = torch.optim.AdamW, {"fused": fused}
    elif name == "SGD":
        optimizer_type, arguments = (
            torch.optim.SGD,
            {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV},
        )
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {name!r}; known are ADAMW and SGD")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        optimizer_type = with_full_model_clipping(optimizer_type, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        optimizer_type = maybe_add_gradient_clipping(cfg, optimizer_type)
    return optimizer_type(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, **arguments)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, each parameter once; the first group has the base learning rate.

    A parameter is of the kind "backbone" if one part of its dotted name is ``backbone``, otherwise "slow" if its name
    contains one of ``SOLVER.SLOW_PARAMETERS``, otherwise "base". ``WEIGHT_DECAY`` applies to every parameter, also to
    norms, biases and embeddings; ``WEIGHT_DECAY_NORM`` and ``WEIGHT_DECAY_BIAS`` replace it where they are not None.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "name" (the kind; a kind has more than one group only if norms or
        biases differ from the rest).
    """
    solver = cfg.SOLVER
    multipliers = {
        "base": 1.0,
        "backbone": solver.BACKBONE_MULTIPLIER,
        "slow": solver.SLOW_MULTIPLIER,
    }
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter, module in _trainable_parameters(model):
        kind = _kind(name, solver.SLOW_PARAMETERS)
        lr, weight_decay = solver.BASE_LR * multipliers[kind], solver.WEIGHT_DECAY
        if isinstance(module, NORM_TYPES):
            weight_decay = _first_given(solver.WEIGHT_DECAY_NORM, weight_decay)
        elif name.rpartition(".")[2] == "bias":
            lr *= solver.BIAS_LR_FACTOR
            weight_decay = _first_given(solver.WEIGHT_DECAY_BIAS, weight_decay)
        group = groups.setdefault(
            (kind, lr, weight_decay),
            {"params": [], "lr": lr, "weight_decay": weight_decay, "name": kind},
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters: nothing to optimise")
    return sorted(groups.values(), key=lambda group: list(multipliers).index(group["name"]))


def with_full_model_clipping(
    optimizer_type: type[torch.optim.Optimizer], max_norm: float, norm_type: float = 2.0
) -> type[torch.optim.Optimizer]:
    """A subclass whose ``step`` first scales all gradients together so that their norm is at most ``max_norm``."""

    class FullModelClipping(optimizer_type):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
            nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
            return super().step(closure)

    FullModelClipping.__name__ = f"{optimizer_type.__name__}WithFullModelClipping"
    return FullModelClipping


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Detectron2's schedule: ``WarmupMultiStepLR`` or ``WarmupCosineLR``; ``WARMUP_ITERS`` 0 means no warm-up."""
    return build_detectron2_lr_scheduler(cfg, optimizer)


def _trainable_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """(name, parameter, owning module) of every parameter with a gradient, shared ones once."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield name, parameter, module


def _kind(name: str, slow: list[str]) -> str:
    if "backbone" in name.split("."):
        return "backbone"
    return "slow" if any(part in name for part in slow) else "base"


def _first_given(value: float | None, default: float) -> float:
    return default if value is None else value
