"""Counting of parameters, FLOPs and activations."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tiny_models import tiny_cfg
from torch import Tensor, nn

from querymask.common.deformable_attention import DeformableAttention
from querymask.common.flops import Parameters, count_parameters, measure
from querymask.common.ops import extension, fvcore_handles
from querymask.common.panoptic import PanopticRule
from querymask.common.pyramid import FeaturePyramid


class Detector(nn.Module):
    """Wraps an inner module in Detectron2's contract: a list of dictionaries in, ``Instances`` out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: list[dict[str, Tensor]]) -> list[dict[str, Instances]]:
        (item,) = batch
        instances = Instances((item["height"], item["width"]))
        values = self.inner(item["image"])
        instances.pred_boxes = Boxes(values.reshape(-1, 1).expand(-1, 4))
        instances.scores = values.flatten()
        return [{"instances": instances}]


def item(height: int = 4, width: int = 6) -> dict[str, Tensor | int]:
    return {"image": torch.rand(3, height, width), "height": height, "width": width}


class Scorer(nn.Module):
    """A convolution, dropout and two uses of one linear layer, with elementwise operations between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.again = self.linear
        self.linear.bias.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        x = self.conv(image[None]).flatten(2).transpose(1, 2)
        return self.again(self.linear(x).sigmoid() * 2).sigmoid()


def test_parameters() -> None:
    counts = count_parameters(Detector(Scorer()))
    conv, linear = 3 * 8 * 9 + 8, 8 * 8 + 8
    assert counts[""] == counts["inner"] == Parameters(conv + linear, conv + linear - 8)
    assert counts["inner.linear"] == Parameters(linear, linear - 8)


def test_cost_by_operator_and_module() -> None:
    model = Detector(Scorer()).train()
    cost = measure(model, item())
    cells = 4 * 6
    conv, linear = cells * 8 * 3 * 9, cells * 8 * 8
    assert cost.flops_by_operator == {"conv": conv, "linear": 2 * linear}
    assert cost.flops_by_module["inner.conv"] == conv
    assert cost.flops_by_module["inner.linear"] == 2 * linear
    assert cost.flops_by_module[""] == cost.flops_by_module["inner"] == conv + 2 * linear
    assert cost.activations_by_module["inner"] == 3 * cells * 8
    assert cost.uncounted == {"aten::sigmoid": 2, "aten::mul": 1}
    assert model.training and model.inner.training


class Attention(nn.Module):
    """The same attention composed in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, image: Tensor) -> Tensor:
        query = image.flatten(1).view(3, 6, 4)
        key, value = query[:, :5], query[:, :5, :3]
        if self.how == "fused":
            return F.scaled_dot_product_attention(query[None], key[None], value[None])
        if self.how == "baddbmm":
            scores = torch.baddbmm(query.new_zeros(3, 6, 5), query, key.transpose(1, 2))
        else:
            scores = query @ key.transpose(1, 2)
        return torch.bmm(scores.softmax(-1), value)


@pytest.mark.parametrize("how", ["fused", "baddbmm"])
def test_attention_counts_like_its_matrix_products(how: str) -> None:
    expected = measure(Detector(Attention("matmul")), item()).flops_by_module[""]
    cost = measure(Detector(Attention(how)), item())
    assert cost.flops_by_module[""] == expected == 3 * 6 * 5 * (4 + 3)
    assert "aten::scaled_dot_product_attention" not in cost.uncounted


class DeformableScorer(nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self.shapes = ((4, 6), (2, 3))[:levels]
        self.attention = DeformableAttention(12, num_heads=3, num_levels=levels, num_points=2)

    def forward(self, image: Tensor) -> Tensor:
        tokens = image.repeat(4, 2, 1).flatten(1).t()[None]  # [1, 48, 12]
        query, value = tokens[:, :5], tokens[:, : sum(height * width for height, width in self.shapes)]
        reference = query.new_full((1, 5, len(self.shapes), 2), 0.5)
        return self.attention(query, reference, value, self.shapes)


@pytest.mark.skipif(extension.EXTENSION.error is not None, reason="the extension is not built")
@pytest.mark.parametrize("levels", [1, 2])
def test_deformable_attention_counts_like_its_pytorch_form(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Detector(DeformableScorer(levels))
    compiled = measure(model, item())
    monkeypatch.setattr(extension, "use_kernels", lambda device: False)
    composed = measure(model, item())
    name = "querymask::multi_scale_deformable_attention"
    assert name in fvcore_handles() and name not in compiled.uncounted
    assert "multi_scale_deformable_attention" in compiled.flops_by_operator
    assert "grid_sampler" in composed.flops_by_operator
    assert compiled.flops_by_module == composed.flops_by_module


def test_reads_of_a_pyramid_count_as_those_of_other_libraries() -> None:
    """Points as fvcore counts ``grid_sample``; boxes not at all, as it does not count ``roi_align``."""
    points, images = 4 * torch.rand(7, 2), torch.zeros(7, dtype=torch.long)

    class Sampler(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return FeaturePyramid([image[None]], [1]).sample(points, images)

    class GridSampler(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return F.grid_sample(image[None], points[None, None] / 2 - 1, align_corners=False)

    class Pooler(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return FeaturePyramid([image[None]], [1]).pool(torch.rand(7, 4), images, 3)

    reads = measure(Detector(Sampler()), item()).flops_by_operator
    expected = measure(Detector(GridSampler()), item()).flops_by_operator
    assert reads["embedding_bag"] == expected["grid_sampler"] == 7 * 3 * 4
    assert measure(Detector(Pooler()), item()).flops_by_operator.get("embedding_bag", 0) == 0


def test_panoptic_model_without_segments() -> None:
    """Its map depends on nothing, but what was computed for it counts: six queries in place of nine pairs."""
    settings = {"NUM_CLASSES": 5, "NUM_QUERIES": 6, "HIDDEN_DIM": 32, "NUM_HEADS": 2, "ENC_LAYERS": 1, "DEC_LAYERS": 2}
    cfg = tiny_cfg("SOLQ", ["res3", "res4", "res5"], settings)
    cfg.MODEL.MASK_CODING.SIZE, cfg.MODEL.MASK_CODING.LENGTH = 16, 20
    torch.manual_seed(0)
    model = build_model(cfg)
    instances = measure(model, item(64, 96))
    model.panoptic = PanopticRule(num_things=3, score=1, mask=0.5, nms=1, pixel=0, agreement=0, area=0)
    segments = measure(model, item(64, 96))
    assert not model.eval()([item(64, 96)])[0]["panoptic_seg"][1]
    for part in ("backbone", "detector"):
        assert segments.flops_by_module[part] == instances.flops_by_module[part] > 0
    embed = "mask_branch.vector_embed"
    assert segments.flops_by_module[embed] / 6 == instances.flops_by_module[embed] / 9 > 0
