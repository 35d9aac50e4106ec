"""The type of mixed precision that a config and a device give."""

import pytest
import torch

from querymask import get_cfg
from querymask.common.engine.setup import training_dtype
from querymask.common.precision import autocast_dtype


@pytest.mark.parametrize(
    "precision, device, capability, expected",
    [
        ("auto", "cpu", None, torch.bfloat16),
        ("bf16", "cpu", None, torch.bfloat16),
        ("auto", "cuda", (9, 0), torch.bfloat16),
        ("auto", "cuda:1", (8, 0), torch.bfloat16),
        ("auto", "cuda", (7, 5), torch.float16),
        ("bf16", "cuda", (8, 6), torch.bfloat16),
        ("fp16", "cuda", (9, 0), torch.float16),
        ("fp16", "cuda", (7, 0), torch.float16),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    device: str,
    capability: tuple[int, int] | None,
    expected: torch.dtype,
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(str(device)) or capability)
    assert autocast_dtype(precision, device) == expected
    assert set(asked) == (set() if device == "cpu" else {device})


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"SOLVER.AMP.PRECISION is 'tf32': choose one of auto, bf16, fp16"):
        autocast_dtype("tf32", "cpu")
    with pytest.raises(ValueError, match="'fp16', which training on a CPU does not have: set it bf16 or auto"):
        autocast_dtype("fp16", "cpu")
    with pytest.raises(ValueError, match="'bf16', which Tesla T4 does not compute in: set it fp16 or auto"):
        autocast_dtype("bf16", "cuda")


def test_config() -> None:
    """Mixed precision is for who asks for it."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    assert training_dtype(cfg) is None
    cfg.SOLVER.AMP.ENABLED = True
    assert training_dtype(cfg) == torch.bfloat16
    cfg.SOLVER.AMP.PRECISION = "fp16"
    with pytest.raises(ValueError, match="AMP.PRECISION"):
        training_dtype(cfg)
