"""The trainer of all methods: Detectron2's, with exact resuming, CPU processes and DETR's optimiser."""

import inspect
import logging
import os
import weakref
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine import hooks as detectron2_hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from querymask.common.data.annotations import read_dataset
from querymask.common.data.copy_paste import CopyPasteMapper
from querymask.common.data.mapper import InstanceMapper
from querymask.common.data.training_set import read_training_set
from querymask.common.engine import hooks, resuming
from querymask.common.engine.averaging import WeightAverage, restore_weights
from querymask.common.engine.checkpointer import StrictCheckpointer
from querymask.common.engine.checks import check_num_classes, check_panoptic, dataset_classes
from querymask.common.engine.class_names import check_class_names, choose_class_names
from querymask.common.engine.evaluating import EarlyStop, EvaluationHook, check_evaluation_keys
from querymask.common.engine.sampling import TrainLoader
from querymask.common.engine.setup import choose_seed, training_dtype
from querymask.common.engine.step import TrainingStep
from querymask.common.engine.trackers import build_trackers
from querymask.common.engine.unused_keys import METHODS, check_unused_keys
from querymask.common.engine.validation import validation_losses
from querymask.common.evaluation import build_evaluator, results_table
from querymask.common.evaluation.build import num_queries, results_folder
from querymask.common.evaluation.class_file import write_class_file
from querymask.common.evaluation.results import evaluate_results
from querymask.common.export import ExportedModel, is_exported
from querymask.common.slicing import SlicedModel
from querymask.common.solver import build_lr_scheduler, build_optimizer

logger = logging.getLogger(__name__)

WRITE_PERIOD = 20
"""Iterations between two lines of the log, as in Detectron2."""


class Trainer(DefaultTrainer):
    """Trains and evaluates any registered meta-architecture."""

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        check_unused_keys(cfg)
        check_evaluation_keys(cfg)
        choose_seed(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        PathManager.mkdirs(cfg.OUTPUT_DIR)
        check_panoptic(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        check_num_classes(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        choose_class_names(cfg)
        for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:  # other differences were told by check_num_classes
            check_class_names(cfg.MODEL.CLASS_NAMES, "the training data", name, warn=False)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        self._trainer = TrainingStep(
            distribute(model), loader, optimizer, cfg.SEED, training_dtype(cfg), accumulation_steps(cfg)
        )
        self._average = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StrictCheckpointer(
            model, cfg.OUTPUT_DIR, cfg=cfg, average=self._average, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in ``OUTPUT_DIR``; without one, or if not told to, load MODEL.WEIGHTS."""
        if resume and not self.checkpointer.has_checkpoint():
            logger.info(f"there is nothing to resume in {self.cfg.OUTPUT_DIR}: training starts at iteration 0")
            resume = False
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self._average is not None and not resume:
            self._average.reset()
        if resume:
            self.start_iter = self.iter + 1  # the checkpoint has the number of the iteration that had just finished
            logger.info(f"resumed at iteration {self.start_iter} from {self.checkpointer.get_checkpoint_file()}")
            for name in self.cfg.DATASETS.TRAIN:
                check_class_names(self.checkpointer.class_names, self.checkpointer.file, name)
            if self._trainer.seed != self.cfg.SEED:
                logger.info(f"the run goes on with its own SEED {self._trainer.seed}")

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to ``max_iter``, then evaluate.

        Returns:
            The results of the evaluation, None if there was none.
        """
        loader = self._trainer.data_loader
        if isinstance(loader, TrainLoader):
            loader.start_at(self.start_iter, self._trainer.seed)
        elif self.start_iter > 0:
            logger.warning(f"{type(loader).__name__} starts anew: the run does not read what it would have read")
        try:
            super().train()
        except EarlyStop:
            if comm.is_main_process():  # which alone has results
                verify_results(self.cfg, self._last_eval_results)
        return getattr(self, "_last_eval_results", None)

    def after_step(self) -> None:
        """Write metrics now and then, and before every checkpoint: none is saved after a loss that is not finite."""
        done = self.iter + 1
        if self._average is not None:
            self._average.update(self.iter)
        periods = (WRITE_PERIOD, self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD or self.max_iter)
        if done == self.max_iter or any(done % period == 0 for period in periods):
            self._trainer.write_metrics()
        super().after_step()

    def after_train(self) -> None:
        """Free the data loader's workers, then what hooks do: evaluate, write, draw."""
        self._trainer.close()
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, schedule, optimiser, its settings and seed (Detectron2 0.5 leaves the optimiser out)."""
        state = {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "seed": self._trainer.seed,
            "solver": resuming.solver_settings(self.cfg),
        }
        if self._average is not None:
            state["training_weights"] = self._average.training_weights()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of ``state_dict``, but the settings of SOLVER are those of the config."""
        if "_trainer" not in state or "seed" not in state:
            raise ValueError(
                f"{self.checkpointer.file} is of a run of another program, or of Detectron2's trainer, which this one "
                "cannot go on with. Start from its weights: without --resume, with MODEL.WEIGHTS"
            )
        saved, optimizer = state.get("solver", {}), self._trainer.optimizer
        fresh = resuming.FreshSettings(optimizer, self.scheduler)
        step = dict(state["_trainer"])
        step["optimizer"] = resuming.fit_optimizer_state(
            step["optimizer"], optimizer, self.checkpointer.model, self.cfg, saved
        )
        TrainerBase.load_state_dict(self, state)
        self._trainer.load_state_dict(step)
        self._trainer.seed = state["seed"]
        resuming.log_changes(saved, resuming.solver_settings(self.cfg))
        fresh.apply(log=not saved)
        self._load_average(state.get("training_weights"))

    def _load_average(self, training_weights: dict[str, torch.Tensor] | None) -> None:
        """Let the model, which has the weights of the checkpoint, go on with those that were in training."""
        if training_weights is None:
            if self._average is not None:
                logger.info("the checkpoint has no average of the weights (SOLVER.EMA_DECAY): it begins now")
                self._average.reset()
        elif self._average is not None:
            self._average.restore(training_weights)
        else:
            logger.info("the average of the weights in the checkpoint is given up: SOLVER.EMA_DECAY is 0")
            restore_weights(self.checkpointer.model.state_dict(keep_vars=True), training_weights)

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are evaluated."""
        return nullcontext() if self._average is None else self._average.applied()

    def _evaluate(self) -> dict[str, Any]:
        with self._averaged():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def _validation_losses(self) -> dict[str, float]:
        with self._averaged():
            return validation_losses(self.cfg, self.model)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks or the project's in their place, and curves at the end."""
        cfg = self.cfg
        losses = self._validation_losses if cfg.TEST.LOSS else None
        instead = {
            detectron2_hooks.LRScheduler: hooks.LRScheduler,
            detectron2_hooks.PeriodicCheckpointer: lambda: hooks.RecentCheckpoints(
                self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_KEPT
            ),
            detectron2_hooks.EvalHook: lambda: EvaluationHook(cfg, self._evaluate, losses, self.checkpointer),
        }
        built = [instead[type(hook)]() if type(hook) in instead else hook for hook in super().build_hooks()]
        if comm.is_main_process():
            built.append(hooks.CurvePlotter(self.cfg.OUTPUT_DIR))
        return built

    def build_writers(self) -> list[EventWriter]:
        """Terminal, metrics.json, what ``TRACKERS`` names and, where it is installed, tensorboard."""
        folder = self.cfg.OUTPUT_DIR
        writers = [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(folder, "metrics.json")),
            *build_trackers(self.cfg),
        ]
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            return writers
        return [*writers, TensorboardXWriter(folder)]

    @classmethod
    def evaluate(cls, cfg: CfgNode, resume: bool = False) -> OrderedDict:
        """Build a model, load ``MODEL.WEIGHTS`` (the last checkpoint in ``OUTPUT_DIR`` if ``resume``), and test it.

        An exported model in ``MODEL.WEIGHTS`` is tested as it is.
        """
        check_unused_keys(cfg)
        check_panoptic(cfg, cfg.DATASETS.TEST)
        check_num_classes(cfg, cfg.DATASETS.TEST)
        if is_exported(cfg.MODEL.WEIGHTS) and not resume:
            model = ExportedModel.from_config(cfg)
            class_names, file = list(model.description.class_names), cfg.MODEL.WEIGHTS
        else:
            model = cls.build_model(cfg)
            checkpointer = StrictCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, complete=True)
            if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
                logger.warning("MODEL.WEIGHTS is empty: a model with random weights is evaluated")
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
            class_names, file = checkpointer.class_names, checkpointer.file
        for name in cfg.DATASETS.TEST:
            check_class_names(class_names, file, name)
            if list(cfg.MODEL.CLASS_NAMES) != class_names:
                check_class_names(cfg.MODEL.CLASS_NAMES, "MODEL.CLASS_NAMES", name)
        results = cls.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    @classmethod
    def evaluate_results(cls, cfg: CfgNode, path: str) -> dict[str, Any]:
        """Evaluate a file of detections (COCO's result format) on the one set of ``DATASETS.TEST``, without a model.

        Returns:
            As ``test``.
        """
        check_unused_keys(cfg)
        if len(cfg.DATASETS.TEST) != 1:
            raise ValueError(
                f"a result file is of one data set, DATASETS.TEST names {len(cfg.DATASETS.TEST)}: set DATASETS.TEST"
            )
        if not comm.is_main_process():
            return {}
        (name,) = cfg.DATASETS.TEST
        dataset_classes(name)
        results = evaluate_results(path, name, cfg.TEST.BOUNDARY_AP, cfg.TEST.DETECTIONS_PER_IMAGE)
        log_results(name, results)
        verify_results(cfg, results)
        return results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device; the log has its size rather than Detectron2's hundreds of lines."""
        model = build_model(cfg)
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(f"{cfg.MODEL.META_ARCHITECTURE}: {total:,} parameters, {trainable:,} of them trainable")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See ``querymask.common.solver``."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """See ``querymask.common.solver``."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Endless batches of ``SOLVER.IMS_PER_BATCH`` images (of all processes together).

        For a GPU they are in pinned memory, and masks are bits, which the project's models read.
        """
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        mapper = InstanceMapper(cfg, is_train=True)
        dicts = read_training_set(
            cfg.DATASETS.TRAIN,
            masks=mapper.use_masks,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_side=cfg.DATALOADER.MIN_IMAGE_SIDE,
            num_queries=num_queries(cfg),
        )
        dataset = DatasetFromList(dicts)
        return TrainLoader(
            dataset,
            CopyPasteMapper(mapper, dataset, cfg.INPUT.COPY_PASTE) if cfg.INPUT.COPY_PASTE else mapper,
            cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=cfg.SEED,
            groups=[int(d["width"] > d["height"]) for d in dicts] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
            repeat_factors=_repeat_factors(cfg, dicts),
            pin_memory=on_gpu,
            pack_masks=on_gpu and cfg.MODEL.META_ARCHITECTURE in METHODS,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Every image of a data set once, one at a time, in the process that evaluates it."""
        arguments = InstanceMapper.from_config(cfg, is_train=False)
        if cfg.TEST.SLICE.SIZE:
            arguments["augmentations"] = ()  # every slice has them
        return build_detection_test_loader(
            read_dataset(dataset_name),
            mapper=InstanceMapper(**arguments),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See ``querymask.common.evaluation``."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> OrderedDict:
        """Evaluate on every set of ``DATASETS.TEST`` and log a table of each.

        Returns:
            {task: {metric: value}}, by data set if there are several; empty in other processes than the main one.
        """
        if comm.get_world_size() > 1:  # the processes' batch norms have seen different images; checkpoints have these
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        if cfg.TEST.SLICE.SIZE:
            model = SlicedModel.from_config(cfg, model)
        results = super().test(cfg, model, evaluators)
        names = cfg.DATASETS.TEST
        if comm.is_main_process():
            for name in names:
                write_class_file(name, results_folder(cfg, name))
        for name, scores in (results if len(names) > 1 else dict.fromkeys(names, results)).items():
            log_results(name, scores)
        return results


def log_results(name: str, scores: dict[str, Any]) -> None:
    """The table of a data set's results, if there are any."""
    if table := results_table(scores):
        logger.info(f"results on {name}:\n{table}")


def distribute(model: nn.Module) -> nn.Module:
    """The model itself in one process; in several, wrapped so that gradients are averaged over the processes."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Buffers are those of frozen norms and never change. torch 2.15 renamed the argument.
    names = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **{sync_buffers: False})


def accumulation_steps(cfg: CfgNode) -> int:
    """The parts in which a process computes its images of a batch.

    Raises:
        ValueError: a batch cannot be cut into as many.
    """
    steps, processes = cfg.SOLVER.ACCUMULATION_STEPS, comm.get_world_size()
    if steps < 1 or cfg.SOLVER.IMS_PER_BATCH % (steps * processes):
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS is {steps}: a batch of SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot "
            f"be cut into as many equal parts in each of {processes} process(es). Make IMS_PER_BATCH a multiple of "
            f"{max(steps, 1) * processes}"
        )
    return steps


def _repeat_factors(cfg: CfgNode, dicts: list[dict]) -> torch.Tensor | None:
    """How often each image comes in an epoch, None for once."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return None
    if name == "RepeatFactorTrainingSampler":
        threshold = cfg.DATALOADER.REPEAT_THRESHOLD
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, threshold)
    raise ValueError(f"DATALOADER.SAMPLER_TRAIN is {name!r}; known are TrainingSampler and RepeatFactorTrainingSampler")
