"""The trainer of all methods: Detectron2's, with exact resuming, CPU processes and DETR's optimiser."""

import logging
import os
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine import hooks as detectron2_hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from querymask.common.data.mapper import InstanceMapper
from querymask.common.engine.checks import StrictCheckpointer, check_num_classes
from querymask.common.engine.hooks import LRScheduler
from querymask.common.engine.sampling import TrainLoader
from querymask.common.engine.step import TrainingStep
from querymask.common.evaluation import build_evaluator
from querymask.common.solver import build_lr_scheduler, build_optimizer

logger = logging.getLogger(__name__)

WRITE_PERIOD = 20
"""Iterations between two lines of the log."""


class Trainer(DefaultTrainer):
    """Trains and evaluates any meta-architecture by a config. ``cfg.SEED`` must be chosen (``default_setup`` does it)."""

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_num_classes(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self._trainer = TrainingStep(
            distribute(model), loader, optimizer, cfg.SEED, cfg.SOLVER.AMP.ENABLED
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StrictCheckpointer(
            model, cfg.OUTPUT_DIR, cfg=cfg, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in ``OUTPUT_DIR`` if there is one, else load ``MODEL.WEIGHTS``."""
        resume = resume and self.checkpointer.has_checkpoint()
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume:
            self.start_iter = (
                self.iter + 1
            )  # the checkpoint has the number of the iteration that had just finished
            logger.info(
                f"resumed at iteration {self.start_iter} from {self.checkpointer.get_checkpoint_file()}"
            )

    def train(self) -> Any:
        """Train from ``start_iter`` to ``max_iter``."""
        self._trainer.data_loader.start_at(self.start_iter, self._trainer.seed)
        return super().train()

    def after_step(self) -> None:
        done = self.iter + 1
        if (
            done % WRITE_PERIOD == 0
            or done % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0
            or done == self.max_iter
        ):
            self._trainer.write_metrics()
        super().after_step()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, schedule, optimiser and seed; Detectron2 0.5 leaves the optimiser out."""
        return {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "seed": self._trainer.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state)
        self._trainer.load_state_dict(state["_trainer"])
        self._trainer.seed = state["seed"]

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks."""
        replaced = [
            LRScheduler() if isinstance(hook, detectron2_hooks.LRScheduler) else hook
            for hook in super().build_hooks()
        ]
        return replaced

    def build_writers(self) -> list[EventWriter]:
        """Terminal, metrics.json and, where it is installed, tensorboard."""
        writers = [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")),
        ]
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            return writers
        return [*writers, TensorboardXWriter(self.cfg.OUTPUT_DIR)]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Endless batches of ``SOLVER.IMS_PER_BATCH`` images, all processes together."""
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        name = cfg.DATALOADER.SAMPLER_TRAIN
        if name == "TrainingSampler":
            repeat_factors = None
        elif name == "RepeatFactorTrainingSampler":
            repeat_factors = (
                RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                    dicts, cfg.DATALOADER.REPEAT_THRESHOLD
                )
            )
        else:
            known = "TrainingSampler and RepeatFactorTrainingSampler"
            raise ValueError(f"DATALOADER.SAMPLER_TRAIN is {name!r}; known are {known}")
        groups = (
            [int(d["width"] > d["height"]) for d in dicts]
            if cfg.DATALOADER.ASPECT_RATIO_GROUPING
            else None
        )
        return TrainLoader(
            DatasetFromList(dicts),
            InstanceMapper(cfg, is_train=True),
            cfg.SOLVER.IMS_PER_BATCH,
            cfg.DATALOADER.NUM_WORKERS,
            cfg.SEED,
            groups,
            repeat_factors,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=InstanceMapper(cfg, is_train=False)
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None
    ) -> OrderedDict:
        """Evaluate on every set of ``DATASETS.TEST``."""
        return super().test(cfg, model, evaluators)


def distribute(model: nn.Module) -> nn.Module:
    """The model itself in one process; in several, wrapped so that gradients are averaged over the processes."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
    )
