"""Images per second of ISTR beside Detectron2's Mask R-CNN: same backbone, image size and batch, one process.

    python benchmarks/istr.py --save benchmarks/results/istr_cpu.md
    python benchmarks/istr.py --device cuda --height 800 --width 1066 --config projects/istr/configs/istr_r50.yaml

Mask R-CNN is that of Detectron2's model zoo: proposals from p2 to p6, 1,000 of them, regions from p2 to p5.

The models have random weights, but both give 100 detections an image. ISTR's boxes stay where they start, as boxes that
random weights move would leave the image. Mask R-CNN's scores are nearly equal for all proposals and classes, so that a
fixed threshold lets either nothing or everything into the suppression of duplicates: its threshold is found before the
timing, such that as many candidates remain as there are proposals. A trained model has fewer at the usual 0.05; the
suppression of 1,000 boxes takes a small part of the time. One thread on the CPU is timed in CPU time, which other jobs
of the machine disturb little; a GPU in its own time.
"""

import argparse
from typing import Any

import querymask  # noqa: F401  before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.events import EventStorage
from torch import nn

from querymask.command_line import load_config, make_parser, markdown_table, parse_benchmark, show_page
from querymask.common.flops import count_parameters
from querymask.common.measured_models import make_batch, random_model
from querymask.common.measuring import machine, median_time
from querymask.common.solver import build_optimizer

SHAPES = "projects/istr/configs/istr_shapes.yaml"


def istr_config(args: argparse.Namespace) -> CfgNode:
    """The config to measure, on the device."""
    return load_config(args.config, ["MODEL.WEIGHTS", "", "TEST.DETECTIONS_PER_IMAGE", 100], args.device)


def mask_rcnn_config(istr: CfgNode) -> CfgNode:
    """Mask R-CNN as in Detectron2's model zoo, on the same backbone and pyramid."""
    cfg = istr.clone()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = with_p6(istr.MODEL.BACKBONE.NAME)
    levels = list(istr.MODEL.ISTR.IN_FEATURES)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.MODEL.RPN.IN_FEATURES = [*levels, "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 2000
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
    heads = cfg.MODEL.ROI_HEADS
    heads.NAME, heads.IN_FEATURES = "StandardROIHeads", levels
    heads.NUM_CLASSES = istr.MODEL.ISTR.NUM_CLASSES
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    box.NAME, box.NUM_FC, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 7
    mask.NAME, mask.NUM_CONV, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 4, 14
    return cfg


def with_p6(name: str) -> str:
    """The name of a backbone like ``name``, with Detectron2's ``p6`` for proposals on the pyramid."""
    if name == "build_resnet_fpn_backbone":
        return name  # has it

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        keys = cfg.MODEL.FPN
        bottom_up = BACKBONE_REGISTRY.get(name)(cfg, input_shape).bottom_up
        top = LastLevelMaxPool()
        return FPN(bottom_up, keys.IN_FEATURES, keys.OUT_CHANNELS, keys.NORM, top, keys.FUSE_TYPE)

    build.__name__ = f"{name}_p6"
    BACKBONE_REGISTRY.register(build)
    return build.__name__


def limit_candidates(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Set the Mask R-CNN's score threshold to leave as many candidates as there are proposals."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    heads = model.roi_heads
    maps = [features[name] for name in heads.box_in_features]
    pooled = heads.box_pooler(maps, [found.proposal_boxes for found in proposals])
    predicted = heads.box_predictor(heads.box_head(pooled))
    scores = torch.cat(heads.box_predictor.predict_probs(predicted, proposals))[:, :-1]  # without the background
    heads.box_predictor.test_score_thresh = scores.flatten().topk(len(scores)).values[-1].item()


def measure(cfg: CfgNode, args: argparse.Namespace) -> tuple[str, ...]:
    """A row of the table."""
    model = random_model(cfg)
    istr, device = cfg.MODEL.META_ARCHITECTURE == "ISTR", args.device
    batch = make_batch(args.batch, (args.height, args.width), args.instances, cfg.MODEL.ISTR.NUM_CLASSES)
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay what they are

    def train() -> None:
        loss = sum(model(batch).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with EventStorage():
        training = median_time(train, device, args.repeats, warmup=1) / 1e3
    model.eval()
    with torch.no_grad():
        if not istr:
            limit_candidates(model, batch)
        found = [len(output["instances"]) for output in model(batch)]
        inference = median_time(lambda: model(batch), device, args.repeats, warmup=1) / 1e3
    parameters = count_parameters(model)[""].total
    name = "ISTR" if istr else "Mask R-CNN (Detectron2)"
    print(f"{name}: {training:.2f} s a training step, {inference:.2f} s an inference", flush=True)
    rates = (f"{args.batch / value:.2f}" for value in (training, inference))
    return (name, f"{parameters:,}", *rates, f"{min(found)} to {max(found)}")


def main() -> None:
    """Measure both models, print and save."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default=SHAPES, help=f"of the ISTR; its backbone is Mask R-CNN's too ({SHAPES})")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--instances", type=int, default=5, help="in every image")
    parser.add_argument("--repeats", type=int, default=5)
    args = parse_benchmark(parser)
    cfg = istr_config(args)
    rows = [measure(config, args) for config in (mask_rcnn_config(cfg), cfg)]
    headers = ["model", "parameters", "training images/s", "inference images/s", "detections"]
    text = (
        f"Backbone, pyramid and number of classes of `{args.config}`, {args.height}x{args.width} pixels, batch "
        f"{args.batch}, {args.instances} instances an image; random weights. Training is a whole step with the "
        f"optimiser.\nMeasured on: {machine(args.device)}\nMedian of {args.repeats} runs after one for warming up; "
        "Mask R-CNN with 1,000 proposals and as many candidates for the suppression of duplicates.\n\n"
        + markdown_table(rows, headers)
    )
    show_page("ISTR beside Mask R-CNN", "benchmarks/istr.py", text, args.save)


if __name__ == "__main__":
    main()
