"""A training step, taken apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from querymask.common.meta_arch import QuerySegmenter
from querymask.common.predictions import Assignment, LossTerm, Normalizers, Predictions, Targets


@dataclass
class Step:
    """What flows between the parts of a model in one step."""

    found: Predictions
    made: Any
    targets: Targets
    truth: Any
    assignment: Assignment
    normalizers: Normalizers
    terms: list[LossTerm]


def training_step(model: QuerySegmenter, batch: Sequence[dict[str, Any]]) -> Step:
    """What ``model(batch)`` does in training, up to the losses."""
    found, made = model.predict(model.preprocess(batch))
    branch = model.mask_branch
    targets = model.targets(batch)
    truth = None if branch is None else branch.encode(targets, found)
    assignment = model.match(found, made, truth, targets)
    normalizers = model.detector.normalizers(targets, assignment)
    terms = list(model.detector.losses(found, targets, assignment, normalizers))
    if branch is not None:
        terms += branch.losses(found, made, truth, targets, assignment, normalizers)
    return Step(found, made, targets, truth, assignment, normalizers, terms)
