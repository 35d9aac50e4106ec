"""Box functions against torchvision, SciPy and loops."""

import math

import pytest
import torch
from scipy.special import logit
from torch.autograd import gradcheck
from torchvision.ops import box_convert, generalized_box_iou

from querymask.common.boxes import generalized_iou, inverse_sigmoid, to_centres, to_corners


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    """XYXY boxes (*shape, 4) in float64 with sides in (0.05, 0.55)."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, dtype=torch.float64, generator=generator)
    side = torch.rand(*shape, 2, dtype=torch.float64, generator=generator) * 0.5 + 0.05
    return torch.cat((low, low + side), dim=-1)


def slow_generalized_iou(a: list[float], b: list[float]) -> float:
    intersection = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


def test_forms_of_boxes() -> None:
    corners = random_boxes(3, 5)
    centres = to_centres(corners)
    assert torch.equal(centres, box_convert(corners, "xyxy", "cxcywh"))
    assert torch.equal(to_corners(centres), box_convert(centres, "cxcywh", "xyxy"))
    assert torch.allclose(to_corners(centres), corners, rtol=0, atol=1e-15)


def test_generalized_iou_of_all_pairs() -> None:
    a, b = random_boxes(7), random_boxes(9, seed=1)
    pairs = generalized_iou(a[:, None], b[None])
    assert torch.allclose(pairs, generalized_box_iou(a, b), rtol=0, atol=1e-14)
    assert (pairs < 0).any() and (pairs > 0).any(), "the boxes must both overlap and lie apart"
    assert generalized_iou(a[:, None], b[None, :0]).shape == (7, 0)


def test_generalized_iou_by_element() -> None:
    a, b = random_boxes(2, 4), random_boxes(2, 4, seed=1)
    values = generalized_iou(a, b)
    for i in range(2):
        for j in range(4):
            assert values[i, j].item() == pytest.approx(slow_generalized_iou(a[i, j].tolist(), b[i, j].tolist()))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),
        ([0, 0, 4, 4], [1, 1, 3, 3], 0.25),
        ([0, 0, 1, 1], [1, 0, 2, 1], 0.0),  # they touch: no overlap, but no gap in the hull either
        ([0, 0, 1, 1], [999, 0, 1000, 1], -0.998),
        ([0, 0, 2, 2], [1, 1, 1, 1], 0.0),  # a point inside of a box
        ([0, 0, 2, 2], [1, 3, 1, 4], -0.5),  # a line outside of a box
    ],
)
def test_generalized_iou_of_special_boxes(a: list[int], b: list[int], expected: float) -> None:
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert generalized_iou(a, b).item() == pytest.approx(expected)
    assert generalized_iou(b, a).item() == pytest.approx(expected)


def test_generalized_iou_of_two_empty_boxes_has_no_value() -> None:
    point = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert math.isnan(generalized_iou(point, point).item())


def test_gradient_of_generalized_iou() -> None:
    a, b = random_boxes(6).requires_grad_(), random_boxes(6, seed=1).requires_grad_()
    assert gradcheck(generalized_iou, (a, b))
    line = torch.tensor([[0.5, 0.1, 0.5, 0.9]], dtype=torch.float64, requires_grad=True)
    generalized_iou(line, b).sum().backward()
    assert torch.isfinite(line.grad).all() and torch.isfinite(b.grad).all()


def test_inverse_sigmoid() -> None:
    x = torch.linspace(1e-4, 1 - 1e-4, 101, dtype=torch.float64)
    assert torch.allclose(inverse_sigmoid(x), torch.from_numpy(logit(x.numpy())), rtol=1e-12, atol=1e-12)
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x, rtol=0, atol=1e-15)
    assert gradcheck(inverse_sigmoid, (x.requires_grad_(),))


def test_inverse_sigmoid_is_bounded() -> None:
    x = torch.tensor([-3.0, 0.0, 1e-9, 1 - 1e-7, 1.0, 7.0], requires_grad=True)
    values = inverse_sigmoid(x)
    bound = math.log(1e5)
    assert values.tolist() == pytest.approx([-bound, -bound, -bound, bound, bound, bound], rel=1e-5)
    assert inverse_sigmoid(x, eps=0.01)[0].item() == pytest.approx(-math.log(100))
    values.sum().backward()
    assert torch.isfinite(x.grad).all()
