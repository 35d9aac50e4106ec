"""A batch that is computed in parts has the gradients of the batch."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from spread_batches import effseg_configs, isda_configs, istr_configs, record, solq_configs
from torch import nn

from querymask.common.engine.step import TrainingStep
from querymask.common.engine.trainer import accumulation_steps
from querymask.common.processes import Processes, alone, batch_in_parts, whole_batch

COUNTS = {"all": [2, 1, 3, 2], "one part only": [2, 0, 9, 0], "more than queries": [0, 9, 1, 0], "none": [0, 0, 0, 0]}
"""Instances of the images by case; two of the models have eight queries."""


@pytest.fixture(scope="module")
def batches() -> dict[str, list[dict]]:
    generator = torch.Generator().manual_seed(1)
    return {case: [record(n, generator) for n in numbers] for case, numbers in COUNTS.items()}


EXACT = [
    (solq_configs, "one-stage"),
    (solq_configs, "two-stage"),
    (isda_configs, "dice"),
    (istr_configs, "sigmoid"),
    (istr_configs, "softmax"),
    (effseg_configs, "no masks"),
    (effseg_configs, "Mask R-CNN, no limit"),
]


@pytest.mark.parametrize(("make", "form"), EXACT, ids=[f"{make.__name__}-{form}" for make, form in EXACT])
@pytest.mark.parametrize("parts", [2, 4])
def test_gradients_are_those_of_the_batch(
    make: Callable, form: str, parts: int, cfg: CfgNode, batches: dict, single_process_gradients: Callable
) -> None:
    config = make(cfg)[form.removesuffix(", no limit")]
    if form.endswith("no limit"):
        config = config.replace("MAX_TRAIN_REGIONS: 7", "MAX_TRAIN_REGIONS: 0")
    whole = single_process_gradients(config, batches)
    in_parts = single_process_gradients(config, batches, parts)
    for case, gradients in whole.items():
        assert case == "none" or any(gradient.abs().sum() > 0 for gradient in gradients.values())
        for name, expected in gradients.items():
            torch.testing.assert_close(in_parts[case][name], expected, rtol=1e-6, atol=1e-9, msg=f"{case}: {name}")


def test_region_heads_count_by_part(cfg: CfgNode, batches: dict, single_process_gradients: Callable) -> None:
    """What they choose in one part cannot depend on the others: gradients are the sums of those of the parts."""
    config = effseg_configs(cfg)["RefineMask"]  # draws nothing at random
    in_parts = single_process_gradients(config, {"all": batches["all"]}, 2)["all"]
    of_parts = single_process_gradients(config, {part: batches["all"][part::2] for part in (0, 1)})
    for name, gradient in in_parts.items():
        torch.testing.assert_close(gradient, of_parts[0][name] + of_parts[1][name], rtol=1e-6, atol=1e-9, msg=name)


def test_limits_of_a_batch_are_divided() -> None:
    scores = torch.arange(10.0)
    together, each_alone = Processes(), Processes(together=False)
    with batch_in_parts(2, [1, 1]):
        assert (together.limit(7), each_alone.limit(7), together.limit(1)) == (3, 7, 1)
        assert (together.count, together.number, each_alone.count) == (2, 1, 1)
        assert (together.share_of_highest(scores, 7), each_alone.share_of_highest(scores, 7)) == (3, 7)
        assert whole_batch([1]) == (1, 1)
        with alone():
            assert (together.count, together.limit(7)) == (1, 7)
    assert together.count == 1 and whole_batch([3]) == [3]


def test_losses_of_the_log_are_those_of_the_batch(cfg: CfgNode, batches: dict) -> None:
    torch.manual_seed(0)
    model = build_model(CfgNode.load_cfg(solq_configs(cfg)["one-stage"])).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    totals = []
    for parts in (1, 2, 4):
        step = TrainingStep(model, [batches["all"]], optimizer, seed=0, parts=parts)
        with EventStorage() as storage:
            step.run_step()
            step.write_metrics()
        totals.append({name: value for name, (value, _) in storage.latest().items() if "loss" in name})
    for other in totals[1:]:
        assert other == pytest.approx(totals[0], rel=1e-5)


def test_memory_is_that_of_a_part(cfg: CfgNode) -> None:
    """The graph of one part is freed before the next one: no more images are in the model at a time."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.seen: list[int] = []

        def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
            self.seen.append(len(batch))
            return {"loss": self.weight * len(batch)}

    model = Counts()
    with EventStorage():
        TrainingStep(model, [[{}] * 6], torch.optim.SGD(model.parameters(), lr=0.1), seed=0, parts=3).run_step()
    assert model.seen == [2, 2, 2] and model.weight.item() == pytest.approx(1 - 0.1 * 2)


@pytest.mark.parametrize("steps", [0, -1, 3])
def test_parts_that_do_not_divide_a_batch(steps: int, cfg: CfgNode) -> None:
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = 4, steps
    with pytest.raises(ValueError, match=f"SOLVER.ACCUMULATION_STEPS is {steps}.*IMS_PER_BATCH 4"):
        accumulation_steps(cfg)
