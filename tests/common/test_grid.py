"""Every detector with every mask branch: a training step, inference, evaluation, a program without Python."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from mask_bases import give_basis
from tiny_models import spread_weights, tiny_cfg
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from querymask.common.evaluation import InstanceEvaluator
from querymask.common.mask_branch import MASK_BRANCH_REGISTRY
from querymask.common.panoptic import PanopticRule

MakeBatch = Callable[..., list[dict[str, Any]]]

FEATURES = ["res2", "res3", "res4", "res5"]
DETECTORS: dict[str, dict[str, Any]] = {
    "SOLQ": {
        "NUM_CLASSES": 5,
        "NUM_QUERIES": 6,
        "HIDDEN_DIM": 128,
        "NUM_HEADS": 8,
        "ENC_LAYERS": 1,
        "DEC_LAYERS": 2,
        "DIM_FEEDFORWARD": 24,
        "DROPOUT": 0.0,
    },
    "ISDA": {
        "NUM_CLASSES": 5,
        "NUM_QUERIES": 6,
        "HIDDEN_DIM": 64,
        "NUM_HEADS": 4,
        "ENC_LAYERS": 1,
        "DEC_LAYERS": 2,
        "DIM_FEEDFORWARD": 24,
        "DROPOUT": 0.0,
    },
    "ISTR": {
        "NUM_CLASSES": 5,
        "NUM_QUERIES": 6,
        "NUM_STAGES": 2,
        "HIDDEN_DIM": 64,
        "NUM_HEADS": 4,
        "DIM_FEEDFORWARD": 24,
        "DIM_DYNAMIC": 4,
        "POOL_SIZE": 3,
    },
    "EffSeg": {
        "NUM_CLASSES": 5,
        "NUM_QUERIES": 500,  # so many that some are matched without any training
        "LEVELS": [2, 3, 4, 5, 6],
        "HIDDEN_DIM": 64,
        "DEC_LAYERS": 1,
        "NUM_HEADS": 4,
        "DIM_FEEDFORWARD": 24,
    },
}
VECTORS = {"MODEL.MASK_CODING.SIZE": 16, "MODEL.MASK_CODING.LENGTH": 20, "MODEL.MASK_BRANCH.VECTOR.HIDDEN_DIM": 24}
CODES = {"MODEL.MASK_CODING.SIZE": 16, "MODEL.MASK_CODING.LENGTH": 20, "MODEL.MASK_BRANCH.CODE.HEAD_LAYERS": 1}
BRANCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "DCT vectors": ("VectorBranch", VECTORS),
    "PCA vectors": ("VectorBranch", {**VECTORS, "MODEL.MASK_CODING.NAME": "pca"}),
    "PCA vectors of pixels, a head for each layer": (
        "VectorBranch",
        {**VECTORS, "MODEL.MASK_CODING.NAME": "pca_pixels", "MODEL.MASK_BRANCH.VECTOR.SHARED_HEAD": False},
    ),
    "flattened vectors": (
        "VectorBranch",
        {**VECTORS, "MODEL.MASK_CODING.NAME": "flatten", "MODEL.MASK_CODING.SIZE": 8, "MODEL.MASK_CODING.LENGTH": 64},
    ),
    "sparse vectors": ("VectorBranch", {**VECTORS, "MODEL.MASK_CODING.NAME": "sparse"}),
    "codes": ("CodeBranch", {**CODES, "MODEL.MASK_CODING.NAME": "dct"}),
    "codes of a convolution": (
        "CodeBranch",
        {
            **CODES,
            "MODEL.MASK_CODING.NAME": "dct",
            "MODEL.MASK_BRANCH.CODE.HEAD": "convolution",
            "MODEL.MASK_BRANCH.CODE.POOL_SIZE": 8,
        },
    ),
    "autoencoder": (
        "CodeBranch",
        {
            **CODES,
            "MODEL.MASK_CODING.NAME": "autoencoder",
            "MODEL.MASK_BRANCH.CODE.HEAD": "convolution",
            "MODEL.MASK_CODING.SIZE": 32,
            "MODEL.MASK_BRANCH.CODE.POOL_SIZE": 8,
        },
    ),
    "linear codes": ("CodeBranch", {**CODES, "MODEL.MASK_CODING.NAME": "pca_linear"}),
    "pixels": ("PixelBranch", {"MODEL.MASK_BRANCH.PIXEL.POOL_SIZE": 7}),
    "kernels": ("KernelBranch", {"MODEL.MASK_BRANCH.KERNEL.MASK_FEATURE_DIM": 32}),
    "EffSeg": ("EffSegBranch", {"MODEL.MASK_BRANCH.EFFSEG.REFINEMENTS": 300}),
    "Mask R-CNN++": ("MaskRCNNBranch", {}),
    "PointRend++": ("PointRendBranch", {}),
    "RefineMask++": ("RefineMaskBranch", {}),
    "SQR": ("SQRBranch", {}),
    "none": ("none", {}),
}
REFUSED = {
    ("ISDA", "none"): "has no boxes, so without masks it finds nothing",
    **{
        ("ISDA", name): "has no boxes"
        for name, (branch, _) in BRANCHES.items()
        if branch not in ("KernelBranch", "none")
    },
    **{(name, "SQR"): "reads the memory of a Deformable DETR" for name in ("ISDA", "ISTR", "EffSeg")},
}
PAIRS = [(detector, branch) for detector in DETECTORS for branch in BRANCHES]


def pair_cfg(detector: str, branch: str) -> CfgNode:
    """The config of a small model of the pair."""
    cfg = tiny_cfg(detector, FEATURES, DETECTORS[detector])
    if detector == "ISTR":
        cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_fpn_backbone"
        cfg.MODEL.FPN.IN_FEATURES = FEATURES
        cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ISTR.HIDDEN_DIM
    name, settings = BRANCHES[branch]
    cfg.MODEL.MASK_BRANCH.NAME = name
    for key, value in settings.items():
        cfg.merge_from_list([key, value])
    if detector == "EffSeg":
        cfg.MODEL.MASK_BRANCH.CODE.COST = "none"
    return cfg


@pytest.fixture
def batch(make_batch: MakeBatch) -> list[dict[str, Any]]:
    """An image of three instances that is to be enlarged, and one without any."""
    batch = make_batch([3, 0], [(64, 96), (56, 80)])
    batch[0].update(image_id=0, height=96, width=144)
    batch[1].update(image_id=1, height=56, width=80)
    return batch


@pytest.fixture
def dataset(batch: list[dict[str, Any]]) -> Iterator[str]:
    """The name of a data set of these images."""
    entries = []
    for item in batch:
        entry = {key: item[key] for key in ("image_id", "height", "width", "file_name")} | {"annotations": []}
        scale, instances = item["height"] / item["instances"].image_size[0], item["instances"]
        masks = nn.functional.interpolate(instances.gt_masks.tensor[:, None].float(), scale_factor=scale)[:, 0]
        for mask, box, label in zip(masks, scale * instances.gt_boxes.tensor, instances.gt_classes, strict=True):
            runs = mask_util.encode(mask.numpy().astype("uint8", order="F"))
            entry["annotations"].append(
                {"segmentation": runs, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(label)}
            )
        entries.append(entry)
    DatasetCatalog.register("grid", lambda: entries)
    MetadataCatalog.get("grid").set(thing_classes=[str(i) for i in range(5)])
    yield "grid"
    DatasetCatalog.remove("grid")
    MetadataCatalog.remove("grid")


class Network(nn.Module):
    """The network of a model, with tensors alone for what comes in and goes out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, padding: Tensor, sides: Tensor) -> list[Tensor]:
        return list(tensors(self.model.network(images, padding, sides, True)))


def tensors(value: Any) -> Iterator[Tensor]:
    """All in nested containers and plain data."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from tensors([item for key, item in vars(leaf).items() if not key.startswith("_")])


@pytest.mark.parametrize(("detector", "branch"), [pair for pair in PAIRS if pair not in REFUSED])
def test_pair(batch: list[dict[str, Any]], dataset: str, detector: str, branch: str) -> None:
    """Every parameter learns something, also from an image without instances; detections have masks and boxes.

    The network is a program that ``torch.export`` can write down, and which gives what the network gives.
    """
    torch.manual_seed(0)
    model = build_model(pair_cfg(detector, branch)).train()
    give_basis(getattr(model.mask_branch, "coding", None))
    spread_weights(parameter for parameter in model.parameters() if parameter.requires_grad)
    losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    if model.mask_branch is not None:
        learns = [p.grad.abs().sum() > 0 for p in model.mask_branch.parameters() if p.requires_grad]
        assert sum(learns) > 0.8 * len(learns)
    with torch.no_grad():
        outputs = model.eval()(batch)
    if branch != "none":
        check_panoptic_maps(model, batch)
    evaluator = InstanceEvaluator(dataset, None)
    evaluator.reset()
    evaluator.process(batch, outputs)
    tasks = (["bbox"] if detector != "ISDA" else []) + (["segm"] if branch != "none" else [])
    scores = evaluator.evaluate()
    assert list(scores) == tasks and all(0 <= scores[task]["AP"] <= 100 for task in tasks)
    for output, item in zip(outputs, batch, strict=True):
        found, size = output["instances"], (item["height"], item["width"])
        assert found.image_size == size and len(found) <= 9
        assert torch.isfinite(found.scores).all()
        assert found.has("pred_boxes") == (detector != "ISDA")
        assert found.has("pred_masks") == (branch != "none")
        if branch != "none":
            assert found.pred_masks.shape == (len(found), *size) and found.pred_masks.dtype == torch.bool
    network, inputs = Network(model), model.network_inputs(model.preprocess(batch))[:3]
    with torch.no_grad():
        expected = network(*inputs)
        program = torch.export.export(network, inputs, strict=False)
        for ours, theirs in zip(expected, program.module()(*inputs), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * max(ours.double().abs().max().item(), 1))


def check_panoptic_maps(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Whatever detects instances also makes panoptic maps, here with thresholds that leave what there is."""
    model.panoptic = PanopticRule(num_things=3, score=0, mask=0.5, nms=1, pixel=0, agreement=0, area=0)
    with torch.no_grad():
        found, made = model.predict(model.preprocess(batch))
        outputs = model(batch)
    model.panoptic = None
    for image, (output, item) in enumerate(zip(outputs, batch, strict=True)):
        assert set(output) == {"panoptic_seg"}
        ids, segments = output["panoptic_seg"]
        assert ids.shape == (item["height"], item["width"]) and ids.dtype == torch.int32
        assert set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
        labels = [segment["category_id"] for segment in segments]
        stuff = [label for label in labels if label >= 3]
        assert labels[len(labels) - len(stuff) :] == sorted(set(stuff))
        assert [segment["isthing"] for segment in segments] == [label < 3 for label in labels]

        queries, labels, scores = model.detector.select_queries(found, image)
        assert len(queries) == len(queries.unique()) and (scores.diff() <= 0).all()
        bands = model.mask_branch.bands(found, made, image, queries, labels)
        numbers, (height, width) = torch.arange(len(queries)), found.canvas.size
        whole = bands(numbers, 0, height)
        assert whole.shape == (len(queries), height, width) and whole.min() >= 0 and whole.max() <= 1
        parts = [bands(numbers, top, min(top + 7, height)) for top in range(0, height, 7)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(bands(numbers[1::2], 3, 9), whole[1::2, 3:9])


@pytest.mark.parametrize(("detector", "branch"), REFUSED)
def test_refused(detector: str, branch: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[detector, branch]):
        build_model(pair_cfg(detector, branch))


def test_every_branch_is_tried() -> None:
    assert {name for name, _ in BRANCHES.values()} == {name for name, _ in MASK_BRANCH_REGISTRY} | {"none"}


def test_a_cost_of_masks_needs_a_matching_by_costs() -> None:
    cfg = pair_cfg("EffSeg", "codes")
    cfg.MODEL.MASK_BRANCH.CODE.COST = "cosine"
    with pytest.raises(ValueError, match="set MODEL.MASK_BRANCH.CODE.COST none"):
        build_model(cfg)


@pytest.mark.parametrize(("detector", "branch"), [("ISTR", "codes"), ("EffSeg", "kernels")])
def test_frozen_detector(detector: str, branch: str) -> None:
    """The mask branch alone is trained, and of it what is trained without."""
    cfg = pair_cfg(detector, branch)
    cfg.MODEL.ISTR.DEEP_SUPERVISION = False  # of CodeBranch's heads, the last one alone has losses
    joint = build_model(cfg)
    cfg.MODEL.MASK_BRANCH.FREEZE_DETECTOR = True
    trained = {name for name, parameter in build_model(cfg).named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, p in joint.named_parameters() if p.requires_grad and name.startswith("mask_branch.")
    }
    assert trained


def test_panoptic_needs_masks_and_enough_classes() -> None:
    cfg = pair_cfg("SOLQ", "none")
    cfg.MODEL.PANOPTIC.ENABLED = True
    with pytest.raises(ValueError, match=r"MODEL\.PANOPTIC\.ENABLED is True, but MODEL\.MASK_BRANCH\.NAME is none"):
        build_model(cfg)
    cfg = pair_cfg("SOLQ", "DCT vectors")
    cfg.MODEL.PANOPTIC.ENABLED = True
    with pytest.raises(ValueError, match=r"NUM_THINGS is 80, but the model has 5 classes"):
        build_model(cfg)
    cfg.MODEL.PANOPTIC.NUM_THINGS = 3
    cfg.MODEL.PANOPTIC.PIXEL_THRESHOLD = 35.0
    with pytest.raises(ValueError, match=r"MODEL\.PANOPTIC\.PIXEL_THRESHOLD is 35\.0: set it between 0 and 1"):
        build_model(cfg)


def test_unknown_branch() -> None:
    cfg = pair_cfg("SOLQ", "none")
    cfg.MODEL.MASK_BRANCH.NAME = "VectorBrunch"
    with pytest.raises(ValueError, match=r"MODEL\.MASK_BRANCH\.NAME is 'VectorBrunch': choose one of CodeBranch, "):
        build_model(cfg)


@pytest.mark.parametrize(
    ("detector", "branch"), [("SOLQ", "DCT vectors"), ("ISDA", "kernels"), ("ISTR", "codes"), ("EffSeg", "EffSeg")]
)
def test_a_dropped_model_is_freed_at_once(make_batch: MakeBatch, detector: str, branch: str) -> None:
    """No reference cycle holds it until the garbage collector comes, which counts objects, not their gigabytes."""
    model = build_model(pair_cfg(detector, branch)).train()
    sum(model(make_batch([2], [(64, 64)])).values()).backward()
    gc.collect()
    gc.disable()
    try:
        parameters = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not any(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()
