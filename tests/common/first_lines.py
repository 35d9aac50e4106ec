"""What users' own scripts do with Detectron2 after ``import querymask``: python first_lines.py FOLDER."""

import importlib.util
import json
import sys
from pathlib import Path

import querymask  # isort: skip  # noqa: F401
import cv2
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor, DefaultTrainer, default_argument_parser, default_setup
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator, inference_on_dataset
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.logger import setup_logger
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from torch import Tensor, nn, zeros

SIZE = (64, 96)
ZOO_MODEL = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
SETTINGS = """
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  MASK_ON: True
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 2, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 16}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
DATASETS: {TRAIN: [first_lines], TEST: [first_lines]}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {MAX_ITER: 1, STEPS: [], IMS_PER_BATCH: 1, BASE_LR: 1e-4}
TEST: {DETECTIONS_PER_IMAGE: 5}
"""


def write_data(folder: Path) -> np.ndarray:
    """An image with two squares, registered as "first_lines"; its pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "a.png"), pixels)
    annotations = []
    for number, x in enumerate((10, 60), start=1):
        polygon = [x, 10, x + 20, 10, x + 20, 30, x, 30]
        common = {"id": number, "image_id": 1, "iscrowd": 0, "area": 400, "bbox": [x, 10, 20, 20]}
        annotations.append({**common, "category_id": number, "segmentation": [polygon]})
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "nut"}],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    register_coco_instances("first_lines", {}, str(folder / "truth.json"), str(folder))
    return pixels


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, name):  # noqa: ANN001, ANN206 (as users write it)
        return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)


def main(folder: Path) -> None:
    assert "torch._dynamo" not in sys.modules  # the compiler, which takes long to import, has not been needed yet
    setup_logger()
    pixels = write_data(folder)
    metadata = MetadataCatalog.get("first_lines")
    (record,) = DatasetCatalog.get("first_lines")
    assert record["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS

    (folder / "settings.yaml").write_text(SETTINGS)
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "settings.yaml"))
    cfg.OUTPUT_DIR = str(folder / "run")
    default_setup(cfg, default_argument_parser().parse_args([]))
    trainer = Trainer(cfg)  # trains on PolygonMasks
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert PolygonMasks([[np.array([1.0, 1, 9, 1, 9, 9])], []]).nonempty().tolist() == [True, False]

    cfg.MODEL.WEIGHTS = str(folder / "run" / "model_final.pth")
    predictor = DefaultPredictor(cfg)
    found = predictor(pixels)["instances"]
    assert len(found) == 5
    for mode in ColorMode:
        visualizer = Visualizer(pixels[:, :, ::-1], metadata=metadata, scale=0.5, instance_mode=mode)
        assert visualizer.draw_dataset_dict(record).get_image().shape == (32, 48, 3)
        assert visualizer.draw_instance_predictions(found).get_image().shape == (32, 48, 3)
    assert VideoVisualizer(metadata).draw_instance_predictions(pixels, found).get_image().shape == (*SIZE, 3)

    build_detection_train_loader(cfg)
    evaluator = COCOEvaluator("first_lines", output_dir=str(folder))  # fast where Detectron2 is compiled
    results = inference_on_dataset(predictor.model, build_detection_test_loader(cfg, "first_lines"), evaluator)
    assert set(results) == {"bbox", "segm"}
    assert np.isfinite(results["segm"]["AP"])
    evaluate_semantic(folder)

    assert model_zoo.get_checkpoint_url(ZOO_MODEL).endswith("model_final_f10217.pkl")
    try:
        assert Path(model_zoo.get_config_file(ZOO_MODEL)).is_file()
    except RuntimeError as error:
        assert "installed without the configs of its model zoo" in str(error)
        assert not (Path(model_zoo.__file__).parent / "configs").exists()
    assert instantiate(LazyCall(nn.Linear)(in_features=2, out_features=3)).out_features == 3

    # torchvision has what it needs of the compiler
    roi_align = sys.modules["torchvision.ops.roi_align"]
    for device in ("cpu", "cuda", "meta"):
        assert roi_align.is_compile_supported(device) == torch._dynamo.utils.is_compile_supported(device)

    # Nothing has been put into other packages
    assert not hasattr(np, "int")
    assert not hasattr(np, "float")
    importlib.util.find_spec("pkg_resources")  # the real one or None; it raises if a stand-in is visible


def evaluate_semantic(folder: Path) -> None:
    cv2.imwrite(str(folder / "classes.png"), np.zeros(SIZE, np.uint8))
    names = {"file_name": str(folder / "a.png"), "sem_seg_file_name": str(folder / "classes.png")}
    DatasetCatalog.register("semantic", lambda: [names])
    MetadataCatalog.get("semantic").set(stuff_classes=["a", "b"], ignore_label=255)
    evaluator = SemSegEvaluator("semantic", distributed=False)
    evaluator.reset()
    evaluator.process([names], [{"sem_seg": scores()}])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == 75


def scores() -> Tensor:
    """Class 0 is the higher one in three quarters of the image."""
    values = zeros(2, *SIZE)
    values[1, : SIZE[0] // 4] = 1
    return values


if __name__ == "__main__":
    main(Path(sys.argv[1]))
