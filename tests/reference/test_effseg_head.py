"""EffSeg's refinement head against its official implementation, stage by stage."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, load_arrays, load_cases
from effseg_inputs import PastedDetections, make_input, official_state, paste
from torch import Tensor, nn

from querymask.common.checkpoint import Drop, apply_rules
from querymask.common.precision import full_precision
from querymask.common.pyramid import FeaturePyramid
from querymask.effseg.fqdet.suppression import Detections, detect
from querymask.effseg.heads import effseg
from querymask.effseg.heads.checkpoint_effseg import EFFSEG_HEAD_RULES
from querymask.effseg.heads.effseg import EffSegHead, assemble_masks
from querymask.effseg.regions import STRIDES, Regions

CASES = load_cases("effseg", "EffSeg head")
SETTINGS = {"kind", "model", "canvas", "image_sizes", "head", "overrides", "inputs", "arrays", "file"}
SETTINGS |= {"input_prefix", "head_name", "processing", "checkpoint_file", "checkpoint_entry"}
NUM_CLASSES, LEVELS = 80, range(2, 8)
CELLS, CHANNELS = slice(None, None, 20), slice(None, None, 8)
DENSE = (slice(None), CHANNELS, slice(None, None, 2), slice(None, None, 2))


def make_head(case: Mapping[str, Any]) -> EffSegHead:
    """The head of a case, its weights loaded strictly; a setting without counterpart is an error."""
    assert not (unknown := set(case) - SETTINGS), f"the case has settings that the project does not know: {unknown}"
    settings = dict(case["head"])
    settings.pop("nms")
    assert case["head_name"] == "effseg", f"unknown head: {case['head_name']}"
    assert case["checkpoint_entry"] is None, f"unknown checkpoint_entry: {case['checkpoint_entry']}"
    head = EffSegHead(processing=case["processing"], refinements=settings.pop("refinements"))
    assert not settings, f"the case has settings that the project does not know: {settings}"
    state = official_state(case)
    rules = [Drop(r"^(?!heads\.gvd\.heads\.2\.)", "not of the head"), *EFFSEG_HEAD_RULES]
    converted, _ = apply_rules({key: torch.as_tensor(value) for key, value in state.items()}, rules)
    head.double().load_state_dict({key.removeprefix("mask_branch.head."): value for key, value in converted.items()})
    return head.eval()


def make_regions(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[tuple[Regions, Detections, Tensor]]:
    """For every image its regions, its detections, and the numbers of the regions among the case's boxes."""
    boxes, images = torch.from_numpy(arrays["boxes"]).double(), torch.from_numpy(arrays["box_image"]).long()
    queries = make_input(case, "query", (len(boxes), 256))
    logits = make_input(case, "cls", (len(boxes), NUM_CLASSES + 1))
    result = []
    for image in range(len(case["image_sizes"])):
        (rows,) = (images == image).nonzero(as_tuple=True)
        found = detect(logits[rows], boxes[rows], case["head"]["nms"], drop_empty=False)
        chosen = rows[found.queries.unique()]
        labels = torch.zeros_like(chosen)
        result.append((Regions(boxes[chosen], images[chosen], queries[chosen], labels), found, chosen))
    return result


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrays = CASES[name], load_arrays("effseg", CASES[name])
    head, canvas = make_head(case), tuple(case["canvas"])
    batch = len(case["image_sizes"])
    sizes = [tuple(-(-side // 2**level) for side in canvas) for level in LEVELS]
    maps = [make_input(case, f"p{level}", (batch, 256, *size)) for level, size in zip(LEVELS, sizes)]
    pyramid = FeaturePyramid(maps[: len(STRIDES)], STRIDES)
    compared = {"boxes", "box_image"}

    def compare(actual: Any, key: str, tolerance: float = 1e-5) -> None:
        assert_close(actual, arrays[key], key, tolerance)
        compared.add(key)

    steps: dict[str, Tensor] = {}

    def keep(module: nn.Module, read: Callable[[Any, Any], Mapping[str, Tensor]]) -> None:
        module.register_forward_hook(lambda module, inputs, output: steps.update(read(inputs, output)))

    pool = effseg.pool_regions
    monkeypatch.setattr(effseg, "pool_regions", lambda *args: steps.setdefault("roi_features", pool(*args)))
    keep(head.query_fusion, lambda inputs, output: {"query_fusion": output})
    keep(head.convs[-1], lambda inputs, output: {"fcn_out": output.relu()})
    for number, stage in enumerate(head.stages, 1):
        keep(stage.child_features, lambda inputs, output, key=f"stage{number}_child_mlp": {key: output})
        keep(stage.fusion, lambda inputs, output, key=f"stage{number}_sampled_backbone": {key: inputs[1]})
        keep(stage.fusion, lambda inputs, output, key=f"stage{number}_key_fusion": {key: output})
        keep(stage.processing, lambda inputs, output, key=f"stage{number}_active_in": {key: inputs[0].active})
        keep(stage.processing, lambda inputs, output, key=f"stage{number}_active_out": {key: output})

    detections = PastedDetections(compare)
    for image, (regions, found, chosen) in enumerate(make_regions(case, arrays)):
        steps.clear()
        compare(chosen, f"img{image}_roi_query")
        stages = head.refine(pyramid, canvas, regions)
        for key in ("roi_features", "query_fusion", "fcn_out"):
            compare(steps[key][DENSE], f"img{image}_{key}")
        for number, stage in enumerate(stages):
            size = stage.features.index_map.shape[1]
            region, y, x = stage.features.cells.long().unbind(1)
            cells, order = ((region * size + y) * size + x).sort()
            compare(cells, f"img{image}_stage{number}_cell")
            compare(stage.segmentation[order], f"img{image}_stage{number}_seg_logits")
            compare(stage.refinement[order], f"img{image}_stage{number}_ref_logits")
            for key in ("child_mlp", "key_fusion", "active_in", "active_out") if number else ():
                compare(steps[f"stage{number}_{key}"][order][CELLS, CHANNELS], f"img{image}_stage{number}_{key}")
            if number:
                sampled = steps[f"stage{number}_sampled_backbone"][order]
                compare(sampled[CELLS, ::16], f"img{image}_stage{number}_sampled_backbone")
        logits = assemble_masks(stages)[-1]
        compare(logits[:, ::2, ::2], f"img{image}_mask_logits_112")

        probabilities = head(pyramid, canvas, regions)
        torch.testing.assert_close(probabilities, full_precision(logits).sigmoid())
        pasted = paste(probabilities, regions.boxes, canvas)[torch.searchsorted(chosen, chosen[0] + found.queries)]
        detections.add(image, pasted, found, (arrays["box_image"] < image).sum() + found.queries)
    detections.compare_all()
    assert not (left := set(arrays) - compared), f"the case has arrays that nothing is compared to: {left}"


def test_settings_that_are_not_known() -> None:
    """They fail by name."""
    if not CASES:
        pytest.skip("the folder has no cases of EffSeg's head")
    case = next(iter(CASES.values()))
    with pytest.raises(AssertionError, match="does not know: {'stride'}"):
        make_head(case | {"stride": 2})
    with pytest.raises(AssertionError, match="does not know: {'sharing': 1}"):
        make_head(case | {"head": case["head"] | {"sharing": 1}})
    with pytest.raises(ValueError, match="processing must be one of"):
        make_head(case | {"processing": "attention"})
