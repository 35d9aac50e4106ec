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
from pathlib import Path
from typing import Any

import querymask  # before Detectron2, which it makes importable on current libraries

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from querymask.common.flops import count_parameters
from querymask.common.mask_coding import fill_missing_bases
from querymask.common.measuring import machine, median_time
from querymask.common.solver import build_optimizer

SHAPES = "projects/istr/configs/istr_shapes.yaml"


def istr_config(args: argparse.Namespace) -> CfgNode:
    """The config to measure, on the device."""
    cfg = querymask.get_cfg()
    cfg.merge_from_file(args.config)
    cfg.merge_from_list(["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", "TEST.DETECTIONS_PER_IMAGE", 100])
    return cfg


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


def make_model(cfg: CfgNode) -> nn.Module:
    """With random weights that give the full number of detections."""
    torch.manual_seed(0)
    model = build_model(cfg)
    fill_missing_bases(model)
    for name, parameter in model.named_parameters():
        if "bboxes_delta" in name:
            nn.init.zeros_(parameter)
    return model


def make_batch(batch: int, size: tuple[int, int], instances: int, num_classes: int) -> list[dict[str, Any]]:
    """Random images of (height, width) ``size``, each with as many discs."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    items = []
    for _ in range(batch):
        radius = (torch.rand(instances, generator=generator) * 0.15 + 0.08) * min(size)
        center = torch.rand(instances, 2, generator=generator) * 0.5 + 0.25
        center = center * torch.tensor([size[1], size[0]])
        distance = (x - center[:, 0, None, None]) ** 2 + (y - center[:, 1, None, None]) ** 2
        found = Instances(size)
        found.gt_boxes = Boxes(torch.cat((center - radius[:, None], center + radius[:, None]), dim=1))
        found.gt_classes = torch.randint(num_classes, (instances,), generator=generator)
        found.gt_masks = BitMasks(distance < radius[:, None, None] ** 2)
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        items.append({"image": image, "instances": found, "height": size[0], "width": size[1]})
    return items


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
    model = make_model(cfg)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=SHAPES, help=f"of the ISTR; its backbone is Mask R-CNN's too ({SHAPES})")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--instances", type=int, default=5, help="in every image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = istr_config(args)
    rows = [measure(config, args) for config in (mask_rcnn_config(cfg), cfg)]
    headers = ["model", "parameters", "training images/s", "inference images/s", "detections"]
    text = (
        "# ISTR beside Mask R-CNN\n\nWritten by `benchmarks/istr.py`.\n\n"
        f"Backbone, pyramid and number of classes of `{args.config}`, {args.height}x{args.width} pixels, batch "
        f"{args.batch}, {args.instances} instances an image; random weights. Training is a whole step with the "
        f"optimiser.\nMeasured on: {machine(args.device)}\nMedian of {args.repeats} runs after one for warming up; "
        "Mask R-CNN with 1,000 proposals and as many candidates for the suppression of duplicates.\n\n"
        + tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
        + "\n"
    )
    print(text)
    if args.save:
        args.save.write_text(text)


if __name__ == "__main__":
    main()
