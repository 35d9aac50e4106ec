"""Training steps and inference of the four R50 methods: time, memory, and how often the host waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from gpu_parts.device import Use, observe
from gpu_parts.operators import PRECISIONS
from gpu_parts.rates import set_tf32
from gpu_parts.results import Cell, Part
from gpu_parts.sizes import Sizes
from querymask.command_line import load_config
from querymask.common.engine.step import TrainingStep
from querymask.common.measured_models import make_batch, random_model
from querymask.common.measuring import median_time, peak_memory
from querymask.common.solver import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"solq": "SOLQ", "isda": "ISDA", "istr": "ISTR", "effseg": "EffSeg"}
INSTANCES = 7  # of an image, as COCO has on average
COLUMNS = (
    "model",
    "precision",
    "step ms",
    "images/s",
    "device ms",
    "kernels",
    "waits",
    "peak MiB",
    "inference ms",
    "device ms ",
    "kernels ",
    "waits ",
    "peak MiB ",
    "detections",
)


def config(method: str, sizes: Sizes, graphs: bool = False) -> CfgNode:
    """Of the method's R50 model, on the device, with random weights; ``graphs``: as CUDA graphs in inference."""
    settings = ["MODEL.WEIGHTS", "", "SOLVER.WARMUP_ITERS", 0, "TEST.CUDA_GRAPHS.ENABLED", graphs]
    file = ROOT / "projects" / method / "configs" / f"{method}_r50.yaml"
    return load_config(file, [*sizes.model_settings(method), *settings], "cuda")


@dataclass
class Subject:
    """A model with what it trains on and is asked to find."""

    cfg: CfgNode
    model: nn.Module
    batch: list[dict[str, Any]]

    @classmethod
    def make(cls, method: str, sizes: Sizes, graphs: bool = False) -> "Subject":
        cfg = config(method, sizes, graphs)
        model = random_model(cfg)
        classes = cfg.MODEL[cfg.MODEL.META_ARCHITECTURE.upper()].NUM_CLASSES
        return cls(cfg, model, make_batch(sizes.batch, (sizes.height, sizes.width), INSTANCES, classes))

    def training(self, dtype: torch.dtype | None) -> Callable[[], None]:
        """A step of the project's own trainer; the weights stay what they are."""
        optimizer = build_optimizer(self.cfg, self.model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        step = TrainingStep(self.model, [self.batch] * 10_000, optimizer, 0, dtype)

        def run() -> None:
            self.model.train()
            with EventStorage(1) as storage:  # statistics are logged in iteration 0 and seldom after it
                step.iter = storage.iter
                step.run_step()

        return run

    def inference(self, dtype: torch.dtype | None) -> Callable[[], list[dict[str, Any]]]:
        """Detections of the first image."""
        image = {key: value for key, value in self.batch[0].items() if key != "instances"}

        def run() -> list[dict[str, Any]]:
            self.model.eval()
            with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
                return self.model([image])

        return run


@contextmanager
def precision(name: str) -> Iterator[torch.dtype | None]:
    """Inside, products are computed in it; gives the type for autocast."""
    dtype, tf32 = PRECISIONS[name]
    before = set_tf32(tf32)
    try:
        yield None if dtype == torch.float32 else dtype
    finally:
        set_tf32(before)


def measure(subject: Subject, dtype: torch.dtype | None, sizes: Sizes) -> tuple[list[Cell], list[tuple[str, Use]]]:
    """The cells of ``COLUMNS`` after the second, and how training and inference use the device."""
    step, step_use = measure_run(subject.training(dtype), sizes)
    detect = subject.inference(dtype)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):  # one region, so weights are rounded once
        detection, detection_use = measure_run(detect, sizes)
        found = len(detect()[0]["instances"])
    cells = [step[0], 1e3 * sizes.batch / step[0], *step[1:], *detection, found]
    return cells, [("training", step_use), ("inference", detection_use)]


def measure_run(run: Callable[[], object], sizes: Sizes) -> tuple[list[Cell], Use]:
    """Milliseconds, then those that the device works, its kernels, waits and peak MiB; and where the waits are."""
    milliseconds = median_time(run, "cuda", sizes.steps, warmup=0 if sizes.pretended else 3)
    use = observe(run, sizes.pretended)
    return [milliseconds, use.busy, use.kernels, use.waits, peak_memory(run, "cuda")], use


def run_eager(part: Part, sizes: Sizes) -> None:
    """As they are."""
    introduce(part, sizes)
    row = part.table("Eager", *COLUMNS)
    found: list[tuple[str, str, str, int]] = []
    for method, title in METHODS.items():
        with part.attempt(title, row, title, None):
            subject = Subject.make(method, sizes)
            for name in sizes.precisions:
                if part.is_over(row, title, name):
                    continue
                with part.attempt(f"{title}, {name}", row, title, name), precision(name) as dtype:
                    cells, uses = measure(subject, dtype, sizes)
                    row(title, name, *cells)
                    if name == "fp32":
                        found += [(title, k, line, n) for k, use in uses for line, n in use.lines.items()]
            del subject
    line_row = part.table("Where the host waits, in fp32", "model", "", "line", "waits")
    for cells in found:
        line_row(*cells)


def run_compiled(part: Part, sizes: Sizes) -> None:
    """The network, from normalised images to what losses and detections are made of, through ``torch.compile``."""
    introduce(part, sizes)
    part.note("`torch.compile` of the method `network`; matching, losses and what follows the network stay eager.")
    row = part.table("Compiled", *COLUMNS, "compilation s")
    for name in ("bf16", "fp32", "TF32"):
        for method, title in METHODS.items():
            if sizes.pretended:
                row(title, name, "skipped: the device is pretended")
                continue
            if part.is_over(row, title, name):
                continue
            with part.attempt(f"{title}, {name}", row, title, name), precision(name) as dtype:
                torch._dynamo.reset()
                subject = Subject.make(method, sizes)
                subject.model.network = torch.compile(subject.model.network)
                seconds = sum(
                    median_time(run, "cuda", 1, warmup=0) / 1e3
                    for run in (subject.training(dtype), subject.inference(dtype))
                )
                row(title, name, *measure(subject, dtype, sizes)[0], seconds)
                del subject


def run_graphs(part: Part, sizes: Sizes) -> None:
    """Inference with ``TEST.CUDA_GRAPHS``."""
    introduce(part, sizes)
    part.note("Inference with `TEST.CUDA_GRAPHS.ENABLED True`. Training as a graph: not available.")
    row = part.table("As CUDA graphs", "model", "precision", *COLUMNS[8:])
    for method, title in METHODS.items():
        if method == "effseg":
            row(title, None, "not available: what it computes depends on the number of its regions")
            continue
        with part.attempt(title, row, title, None):
            subject = Subject.make(method, sizes, graphs=True)
            for name in sizes.precisions:
                if part.is_over(row, title, name):
                    continue
                with part.attempt(f"{title}, {name}", row, title, name), precision(name) as dtype:
                    detect = subject.inference(dtype)
                    for _ in range(2):  # an ordinary call, and the capture
                        detect()
                    cells, _ = measure_run(detect, sizes)
                    row(title, name, *cells, len(detect()[0]["instances"]))
            del subject


def introduce(part: Part, sizes: Sizes) -> None:
    """What the tables show."""
    part.note(
        f"Random weights; images of {sizes.height}x{sizes.width} with {INSTANCES} objects each. A step is one of the "
        f"trainer's with {sizes.batch} images, from images in the host's memory to the changed weights; inference is "
        f"of one image. Medians of {sizes.steps}. Device ms: of all kernels and copies; the rest of the time it "
        "waits for the host. Waits: of the host for the device in one step or image. bf16, fp16: by autocast. "
        "MiB: peak beyond the weights and what the step keeps."
    )
