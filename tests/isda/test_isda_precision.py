"""ISDA under autocast: no more error than must be."""

from collections.abc import Callable
from typing import Any

import pytest
from rounded_products import check_precision
from torch import nn


@pytest.mark.parametrize("form", [{"KERNEL_POSITIONS": "logit"}, {"KERNEL_LOSS": "iou"}], ids=["release", "paper"])
def test_error_of_bfloat16(
    make_model: Callable[..., nn.Module],
    form: dict[str, Any],
    precision_batches: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most twice that of the same network in float64 whose products alone are rounded."""
    check_precision(make_model(**form), precision_batches(), monkeypatch)
