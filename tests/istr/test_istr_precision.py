"""ISTR under autocast: no more error than must be, and nothing beyond float16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from float16_training import check_float16_training
from rounded_products import check_precision
from torch import nn

from querymask.common.pyramid import FeaturePyramid


@pytest.mark.parametrize("form", [{}, {"CLASSIFIER": "softmax", "ATTENTION": "multi_head"}], ids=["sigmoid", "softmax"])
def test_error_of_bfloat16(
    make_model: Callable[..., nn.Module],
    form: dict[str, Any],
    precision_batches: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most twice that of the same network in float64 whose products alone are rounded."""
    check_precision(make_model(**form), precision_batches(), monkeypatch)


def test_queries_of_any_size_attend_in_float16(make_model: Callable[..., nn.Module]) -> None:
    """The first stage's are sums of maps as they are; the products of such queries would be infinite in float16."""
    stage = make_model().cpu().detector.stages[0]
    queries = 2000 * torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    products = queries @ queries.transpose(1, 2)
    assert products.half().isinf().any()
    pyramid = FeaturePyramid([torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 4, 4)], [4, 8])
    boxes = torch.tensor([2.0, 3, 20, 25]).expand(2, 6, 4)
    expected = stage(pyramid, boxes, queries)
    with torch.autocast("cpu", dtype=torch.float16):
        found = stage(pyramid, boxes, queries)
    for name in ("logits", "features", "boxes"):
        torch.testing.assert_close(
            getattr(found, name).float(), getattr(expected, name), rtol=0.01, atol=0.02, msg=name
        )


def test_training_in_float16(
    make_model: Callable[..., nn.Module], make_batch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is lost to the loss scale."""
    model = make_model()
    for stage in model.detector.stages:  # of random weights, they move boxes out of the image
        nn.init.zeros_(stage.bboxes_delta.weight)
    check_float16_training(model, [make_batch([3], [(64, 96)])], monkeypatch)
