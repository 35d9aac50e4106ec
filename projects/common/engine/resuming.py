"""Resuming with other settings of SOLVER: the config's apply, and the log says which have changed."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier
from torch import nn

from querymask.common.solver import parameter_groups

logger = logging.getLogger(__name__)

GROUP_SETTINGS = ("initial_lr", "weight_decay", "momentum", "nesterov")
"""What an optimiser's group has from the config, beside the learning rate of the iteration."""


def solver_settings(cfg: CfgNode) -> dict[str, Any]:
    """{dotted key: value} of SOLVER, of types that a checkpoint may hold."""

    def flat(node: CfgNode, prefix: str) -> dict[str, Any]:
        settings = {}
        for key, value in node.items():
            if isinstance(value, CfgNode):
                settings.update(flat(value, f"{prefix}{key}."))
            else:
                settings[prefix + key] = list(value) if isinstance(value, tuple) else value
        return settings

    return flat(cfg.SOLVER, "SOLVER.")


def log_changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """A line for each setting that the checkpoint and the config have with different values."""
    for key, value in present.items():
        if key in saved and saved[key] != value:
            logger.info(f"{key}: {saved[key]} in the checkpoint, {value} from now on")


def fit_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module, cfg: CfgNode, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """The state that a checkpoint has of the optimiser, in the order of the present groups of parameters.

    Args:
        state: the state dict of an optimiser; it numbers the parameters of all groups.
        saved: ``solver_settings`` of the checkpoint; empty for one of an earlier version, which does not have them.

    Raises:
        ValueError: it is of another optimiser, or of other parameters.
    """
    groups = state["param_groups"]
    saved_type = saved.get("SOLVER.OPTIMIZER", "ADAMW" if "betas" in groups[0] else "SGD")
    if saved_type != cfg.SOLVER.OPTIMIZER:
        raise ValueError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}, but the checkpoint to resume is of {saved_type}, whose state "
            f"means nothing to {cfg.SOLVER.OPTIMIZER}. Set SOLVER.OPTIMIZER {saved_type}; or start anew from its "
            "weights: without --resume, with MODEL.WEIGHTS and another OUTPUT_DIR"
        )
    order = _saved_order(groups, optimizer, model, cfg, saved)
    present = optimizer.state_dict()["param_groups"]
    if order is not None:
        numbers = {parameter: i for i, parameter in enumerate(order)}
        mapped = [numbers[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        entries = {new: state["state"][old] for new, old in enumerate(mapped) if old in state["state"]}
        return {"state": entries, "param_groups": present}
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
        raise ValueError(
            f"the checkpoint to resume is of {sum(len(group['params']) for group in groups)} trained parameters in "
            f"{len(groups)} groups, the config makes {sum(len(group['params']) for group in present)} in "
            f"{len(present)}. Frozen parts must stay the same (MODEL.BACKBONE.FREEZE_AT), and what makes groups: "
            "SOLVER.SLOW_PARAMETERS, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR. Or start anew from its "
            "weights: without --resume, with MODEL.WEIGHTS and another OUTPUT_DIR"
        )
    return state


def _saved_order(
    groups: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    cfg: CfgNode,
    saved: Mapping[str, Any],
) -> list[nn.Parameter] | None:
    """The model's parameters as the checkpoint numbers them; None where its settings do not tell."""
    then = cfg.clone()
    then.defrost()
    for key, value in saved.items():
        *sections, name = key.split(".")
        node = then
        for section in sections:
            node = node.get(section, CfgNode())
        node[name] = value
    order = [group["params"] for group in parameter_groups(then, model)]
    now = [group["params"] for group in parameter_groups(cfg, model)]
    own = [[id(p) for p in part] for part in now] == [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    same_groups = [len(part) for part in order] == [len(group["params"]) for group in groups]
    if not (saved and own and same_groups):  # groups of another program, or other parameters than those of the file
        return None
    return [parameter for part in order for parameter in part]


class FreshSettings:
    """The settings that an optimiser and its schedule have from the config, to be applied after a state is loaded."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.groups = [{k: group[k] for k in GROUP_SETTINGS if k in group} for group in optimizer.param_groups]
        self.base_lrs = list(getattr(scheduler, "base_lrs", ()))

    def apply(self, log: bool) -> None:
        """Put them in the place of the checkpoint's.

        Args:
            log: say what differs, group by group; for checkpoints without ``solver_settings``.
        """
        if not isinstance(self.scheduler, LRMultiplier):
            logger.info(
                f"the learning rates and weight decays of the checkpoint are kept: {type(self.scheduler).__name__} is "
                "a schedule of another program"
            )
            return
        for group, fresh in zip(self.optimizer.param_groups, self.groups, strict=True):
            for key, value in fresh.items():
                if log and group.get(key) != value:
                    shown = "learning rate" if key == "initial_lr" else key.replace("_", " ")
                    name = f"{shown} of the {group.get('name', 'only')} parameters"
                    logger.info(f"{name}: {group.get(key)} in the checkpoint, {value} from now on")
            group.update(fresh)
        self.scheduler.base_lrs = self.base_lrs
        rates = self.scheduler.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates
