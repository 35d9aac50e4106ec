"""Parameter groups, clipping over the whole model, schedules."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

import querymask
from querymask import get_cfg
from querymask.common.solver import build_lr_scheduler, build_optimizer, parameter_groups


class Toy(nn.Module):
    """Parameters of every kind: backbone, slow, norm, bias, frozen, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        self.backbone.sampling_offsets = nn.Linear(2, 2)  # backbone wins over slow
        self.sampling_offsets = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)
        self.backbone_projection = nn.Linear(4, 4)  # its name only begins like the backbone's
        self.tied = self.head
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.level_embed = nn.Parameter(torch.zeros(4))


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WEIGHT_DECAY = 0.1
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.5
    cfg.SOLVER.SLOW_MULTIPLIER = 0.2
    return cfg


def names(model: nn.Module, group: dict) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}


def test_three_groups_with_weight_decay_on_everything(cfg: CfgNode) -> None:
    model = Toy()
    groups = parameter_groups(cfg, model)
    assert [group["name"] for group in groups] == ["base", "backbone", "slow"]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.005, 0.002])
    assert {group["weight_decay"] for group in groups} == {0.1}
    base, backbone, slow = (names(model, group) for group in groups)
    assert base == {
        *("norm.weight", "norm.bias", "head.weight", "head.bias", "level_embed"),
        *("backbone_projection.weight", "backbone_projection.bias"),
    }
    assert backbone == {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    assert slow == {"sampling_offsets.weight", "sampling_offsets.bias"}
    assert sum(len(group["params"]) for group in groups) == len([p for p in model.parameters() if p.requires_grad])


def test_norms_and_biases_may_differ(cfg: CfgNode) -> None:
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.3
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    model = Toy()
    by_name = {name: group for group in parameter_groups(cfg, model) for name in names(model, group)}
    expected = {
        "head.weight": (0.01, 0.1),
        "head.bias": (0.02, 0.3),
        "norm.weight": (0.01, 0.0),
        "norm.bias": (0.01, 0.0),
        "backbone.1.weight": (0.005, 0.0),
        "backbone.0.bias": (0.01, 0.3),
        "level_embed": (0.01, 0.1),
    }
    for name, (lr, weight_decay) in expected.items():
        assert by_name[name]["lr"] == pytest.approx(lr), name
        assert by_name[name]["weight_decay"] == weight_decay, name


@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])
def test_full_model_clipping_scales_all_gradients_together(cfg: CfgNode, optimizer: str) -> None:
    """One step equals PyTorch's optimiser after clip_grad_norm_ over all parameters."""
    cfg.SOLVER.OPTIMIZER = optimizer
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    torch.manual_seed(0)
    model, twin = Toy(), Toy()
    twin.load_state_dict(model.state_dict())
    ours = build_optimizer(cfg, model)
    groups = parameter_groups(cfg, twin)
    theirs = torch.optim.AdamW(groups) if optimizer == "ADAMW" else torch.optim.SGD(groups, momentum=0.9)
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters()):
            if p.requires_grad:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_([q for q in twin.parameters() if q.requires_grad], 0.1)
        ours.step()
        theirs.step()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        assert gradients.norm().item() == pytest.approx(0.1, rel=1e-4)
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q)


def test_small_gradients_are_not_scaled(cfg: CfgNode) -> None:
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    model = Toy()
    model.head.weight.grad = torch.full((4, 4), 0.01)
    build_optimizer(cfg, model).step()
    assert torch.equal(model.head.weight.grad, torch.full((4, 4), 0.01))


@pytest.mark.parametrize(("clip_type", "expected"), [("value", 0.1), ("norm", 0.025)])
def test_detectron2_clipping_works_on_one_tensor_at_a_time(cfg: CfgNode, clip_type: str, expected: float) -> None:
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    model = Toy()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    build_optimizer(cfg, model).step()
    assert model.head.weight.grad.max().item() == pytest.approx(expected, rel=1e-3)  # 16 entries


def learning_rates(cfg: CfgNode, count: int) -> list[float]:
    """Of the base group in the first iterations."""
    optimizer = build_optimizer(cfg, Toy())
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * rates[-1])
        optimizer.step()
        scheduler.step()
    return rates


def test_steps_without_warmup(cfg: CfgNode) -> None:
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA = 10, (4, 8), 0.1
    assert learning_rates(cfg, 10) == pytest.approx([0.01] * 4 + [0.001] * 4 + [0.0001] * 2)


def test_warmup_and_cosine(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.MAX_ITER = 0, 0.1, 8
    assert learning_rates(cfg, 8)[::4] == pytest.approx([0.01, 0.005])
    cfg.SOLVER.WARMUP_ITERS = 4
    rates = learning_rates(cfg, 8)
    assert rates[0] == pytest.approx(0.001)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)


def test_unknown_optimizer_is_refused(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match="'LION'; known are ADAMW and SGD"):
        build_optimizer(cfg, Toy())


def test_model_without_trainable_parameters_is_refused(cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(cfg, Toy().requires_grad_(False))


def test_group_sizes_of_solq_r50() -> None:
    """(tensors, elements) as counted in the release, which has 91 classes."""
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(querymask.__file__).parent / "solq/configs/solq_r50.yaml"))
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.SOLQ.NUM_CLASSES = 91
    with torch.device("meta"):
        groups = parameter_groups(cfg, build_model(cfg))
    sizes = {g["name"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups}
    assert sizes == {"base": (276, 29_555_258), "backbone": (42, 23_232_512), "slow": (26, 1_183_490)}
