"""Hooks that Detectron2 lacks."""

import torch
from detectron2.engine import hooks


class LRScheduler(hooks.LRScheduler):
    """Detectron2's hook, but the learning rate in the log is that of the first group (the base one).

    Detectron2 shows the group with the most tensors, which may be the backbone's.
    """

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        return 0
