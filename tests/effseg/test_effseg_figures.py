"""Pictures of EffSeg's refinement: cells are drawn where they are, and are those that inference refines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from querymask.common.views import choose_view
from querymask.common.visualization import class_colour
from querymask.effseg.figures import OPACITY, Refinement, draw_active_cells, draw_refinement, refinement
from querymask.effseg.pasting import paste_probabilities

SIZES = [14, 28, 56, 112]


@pytest.fixture(scope="module")
def item() -> dict[str, Any]:
    image = torch.randint(256, (3, 60, 76), generator=torch.Generator().manual_seed(0)).float()
    return {"image": image, "height": 60, "width": 76}


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(BRANCH="EffSegBranch", NUM_QUERIES=20).eval()


def tinted(picture: np.ndarray, index: int) -> np.ndarray:
    """Pixels that a black image has where an object's cells were drawn."""
    return (picture == (OPACITY * np.array(class_colour(index))).astype(np.uint8)).all(2)


def test_cells_are_drawn_where_they_are() -> None:
    """Pixel by pixel: those whose centres are in an active cell, less the outline of the box."""
    active = torch.zeros(2, 4, 4, dtype=torch.bool)
    active[0, 1, 2] = active[0, 3, 0] = True
    active[1, 2:] = True
    boxes = torch.tensor([[10.3, 4.2, 26.3, 16.2], [-20.0, 20.0, 20.0, 60.0]])  # the second leaves the image
    picture = draw_active_cells(np.zeros((50, 40, 3), np.uint8), boxes, active)
    assert picture.shape == (50, 40, 3)
    for index, box in enumerate(boxes.tolist()):
        x0, y0, x1, y1 = box
        marks = tinted(picture, index)
        inner = 0
        for y in range(50):
            for x in range(40):
                column, row = ((x + 0.5 - x0) / (x1 - x0) * 4, (y + 0.5 - y0) / (y1 - y0) * 4)
                inside = 0 <= column < 4 and 0 <= row < 4
                edge = not (x0 + 2 < x + 0.5 < x1 - 2 and y0 + 2 < y + 0.5 < y1 - 2) or x == 0 or y == 49
                # Lines of the grid, where cells are large, are the first row and column of a cell
                line = (x1 - x0) / 4 >= 5 and (y1 - y0) / 4 >= 5 and min(column % 1, row % 1) < 0.15
                if inside and not edge and not line:
                    assert marks[y, x] == bool(active[index, int(row), int(column)]), (index, x, y)
                    inner += marks[y, x]
                elif not inside:
                    assert not marks[y, x], (index, x, y)
        assert inner > 5


def test_boxes_beyond_the_image_and_broken_ones() -> None:
    image = np.full((30, 40, 3), 7, np.uint8)
    boxes = torch.tensor([[50.0, 0, 60, 10], [5, 5, 5, 9], [float("nan"), 0, 9, 9], [0, 9, 9, 2]])
    picture = draw_active_cells(image, boxes, torch.ones(4, 14, 14, dtype=torch.bool))
    assert np.array_equal(picture, image)
    assert picture is not image


def test_small_objects_stay_visible() -> None:
    boxes = torch.tensor([[10.0, 10, 30, 30], [0, 0, 40, 40]])
    picture = draw_active_cells(np.zeros((40, 40, 3), np.uint8), boxes, torch.ones(2, 14, 14, dtype=torch.bool))
    blend = OPACITY * np.array(class_colour(0)) + (1 - OPACITY) * OPACITY * np.array(class_colour(1))
    assert np.abs(picture[20, 20] - blend).max() < 2
    assert tinted(picture, 1)[5, 5]


def test_masks_get_finer_in_the_picture() -> None:
    """Masks are pasted into their boxes; there is a panel of cells and one of masks for every stage."""
    active = [torch.ones(1, size, size, dtype=torch.bool) for size in (2, 4)]
    masks = [torch.zeros(1, size, size) for size in (2, 4)]
    masks[1][0, :, :2] = 1
    refined = Refinement(torch.tensor([[0.25, 0.25, 0.75, 0.75]]), active, masks)
    picture = draw_refinement(np.full((512, 640, 3), 60, np.uint8), refined)
    empty = draw_refinement(
        np.full((512, 640, 3), 60, np.uint8),
        Refinement(torch.zeros(0, 4), [m[:0] for m in active], [m[:0] for m in masks]),
    )
    assert picture.shape == empty.shape
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    assert height > 512 and width > 640
    coloured = np.ptp(picture.astype(int), axis=2) > 30
    cells, coarse, fine = coloured[:height], coloured[height:, :width], coloured[height:, width:]
    assert cells[:, :width].any() and cells[:, width:].any()
    assert not coarse.any()
    rows, columns = fine.nonzero()
    assert abs(np.ptp(rows) - 256) < 8 and abs(np.ptp(columns) - 160) < 8  # a mask's left half fades into the rest


def test_cells_and_masks_are_those_of_inference(model: nn.Module, item: dict[str, Any]) -> None:
    with torch.no_grad():
        found = model([item])[0]["instances"].to("cpu")
    queries = list(dict.fromkeys(found.pred_queries.tolist()))
    assert queries, "the tiny model detects nothing: this test would prove nothing"
    refined = refinement(model, item, score_threshold=0.0)
    assert refined.boxes.shape == (len(queries), 4)
    assert [mask.shape[1:] for mask in refined.masks] == [(size, size) for size in SIZES]
    assert refined.active[0].all()
    for stage, (coarse, fine) in enumerate(zip(refined.active, refined.active[1:]), 1):
        blocks = fine.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        assert torch.equal(blocks.any(4).any(2), blocks.all(4).all(2)), stage  # a cell's children together
        assert not (blocks.any(4).any(2) & ~coarse).any(), stage  # of active cells alone
        assert 4 * model.mask_branch.head.refinements >= fine.sum() > 0, stage
    # The last masks are those of the detections, but for rounding of the boxes
    rows = [found.pred_queries.tolist().index(query) for query in queries]
    boxes = refined.boxes * refined.boxes.new_tensor([76, 60, 76, 60])
    pasted = paste_probabilities(refined.masks[-1], boxes, (0, 60), (0, 76)) > 0.5
    assert found.pred_masks[rows].any()
    assert (pasted != found.pred_masks[rows]).flatten(1).sum(1).max() <= 2
    # Fewer objects, the same cells: all regions competed
    scores = found.scores
    best = refinement(model, item, score_threshold=scores[0].item())
    assert 0 < len(best.boxes) < len(queries)
    for all_cells, cells in zip(refined.active, best.active):
        assert torch.equal(all_cells[: len(cells)], cells)


def test_view(model: nn.Module, item: dict[str, Any]) -> None:
    """Of the same size whatever is found, as a video needs it."""
    view = choose_view("refinement", "EffSeg")
    image = item["image"].byte().permute(1, 2, 0).numpy().copy()
    sizes = {view(model, item, image, ["thing"], threshold).shape for threshold in (0.0, 2.0)}
    assert len(sizes) == 1
    nothing = refinement(model, item, score_threshold=2.0)
    assert [tuple(mask.shape) for mask in nothing.masks] == [(0, size, size) for size in SIZES]
    with pytest.raises(ValueError, match="'refinement' is for EffSeg; ISDA has"):
        choose_view("refinement", "ISDA")


def test_models_without_the_head(make_model: Callable[..., nn.Module], item: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this model has no such head: set MODEL.MASK_BRANCH.NAME EffSegBranch"):
        refinement(make_model(), item)
    with pytest.raises(ValueError, match="this model has MaskRCNNHead"):
        refinement(make_model(BRANCH="MaskRCNNBranch"), item)
