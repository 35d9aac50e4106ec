import copy
import pickle

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from querymask import get_cfg
from querymask.common.data import mapper as mapper_module
from querymask.common.data.augmentation import RandomCropOfRange, ResizeShortestSide
from querymask.common.data.mapper import InstanceMapper

HEIGHT, WIDTH = 150, 200
POLYGON = [20.0, 30.0, 120.0, 40.0, 90.0, 130.0]


def polygon_mask():
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects([POLYGON], HEIGHT, WIDTH)))


def annotation(**changes):
    box = {"bbox": [20.0, 30.0, 100.0, 100.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    return {**box, "segmentation": [POLYGON], **changes}


@pytest.fixture
def entry(tmp_path):
    """A data set entry whose picture tells every pixel's place: red is x, green is y."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    file_name = str(tmp_path / "ramp.png")
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2)).save(file_name)
    return {"file_name": file_name, "height": HEIGHT, "width": WIDTH, "image_id": 7, "annotations": [annotation()]}


def make_mapper(*augmentations, **options):
    return InstanceMapper(True, augmentations=augmentations, **options)


def test_without_augmentation(entry):
    before = copy.deepcopy(entry)
    output = make_mapper()(entry)
    assert entry == before
    assert set(output) == {"file_name", "height", "width", "image_id", "image", "instances"}
    assert output["image"].dtype == torch.uint8 and output["image"].shape == (3, HEIGHT, WIDTH)
    np.testing.assert_array_equal(output["image"].permute(1, 2, 0), np.asarray(Image.open(entry["file_name"])))
    instances = output["instances"]
    assert instances.image_size == (HEIGHT, WIDTH)
    assert instances.gt_boxes.tensor.tolist() == [[20, 30, 120, 130]]
    assert instances.gt_classes.tolist() == [1] and instances.gt_classes.dtype == torch.int64
    assert instances.gt_masks.tensor.dtype == torch.bool
    np.testing.assert_array_equal(instances.gt_masks.tensor[0], polygon_mask())


def test_test_time(entry):
    mapper = InstanceMapper(False, augmentations=[ResizeShortestSide([75], 90)])
    output = mapper(entry)
    assert output["image"].shape == (3, 68, 90) and "instances" not in output and "annotations" not in output
    assert (output["height"], output["width"], output["image_id"]) == (HEIGHT, WIDTH, 7)


def test_from_config(entry):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "SOLQ"
    cfg.MODEL.SOLQ.NUM_CLASSES = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (75,), 999, "none"
    cfg.INPUT.MAX_INSTANCES = 3
    mapper = InstanceMapper(cfg, True)
    output = mapper(entry)
    assert output["image"].shape == (3, 75, 100) and output["instances"].has("gt_masks")
    assert (mapper.num_classes, mapper.max_instances) == (2, 3)
    cfg.INPUT.FORMAT = "BGR"
    assert InstanceMapper(cfg)(entry)["image"].flip(0).equal(output["image"])
    cfg.MODEL.MASK_BRANCH.NAME = "none"
    assert not InstanceMapper(cfg)(entry)["instances"].has("gt_masks")
    assert "instances" not in InstanceMapper(cfg, False)(entry)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"  # no section of its own: Detectron2's key decides
    assert InstanceMapper(cfg).num_classes is None and not InstanceMapper(cfg).use_masks


def source_of(image):
    """Which place of the original each pixel of an augmented ramp shows: x and y in pixel centres, [H, W] each."""
    return image[0].numpy().astype(float), image[1].numpy().astype(float)


@pytest.mark.parametrize("seed", range(12))
def test_masks_and_boxes_follow_the_picture(entry, seed):
    """The whole recipe (flip, resize, resize, crop, resize) against what the pixels themselves say."""
    resize = ResizeShortestSide([100, 140, 230], 300)
    branch = T.AugmentationList([ResizeShortestSide([120, 180]), RandomCropOfRange(90, 150)])
    mapper = make_mapper(T.RandomFlip(), resize, T.RandomApply(branch, 0.7), resize)
    np.random.seed(seed)
    output = mapper(entry)
    instances = output["instances"]
    assert len(instances) == 1
    x, y = source_of(output["image"])

    original = polygon_mask()
    expected = original[np.rint(y).astype(int), np.rint(x).astype(int)].astype(bool)
    scale = max(1, int(np.ceil(np.ptp(x) and x.shape[1] / np.ptp(x))))
    # Three pixels of the original around the outline are not judged: every resize moves a mask by up to half of one
    kernel = np.ones((6 * scale + 1,) * 2, np.uint8)
    sure = cv2.dilate(expected.astype(np.uint8), kernel) == cv2.erode(expected.astype(np.uint8), kernel)
    assert sure.mean() > 0.5
    mask = instances.gt_masks.tensor[0].numpy()
    np.testing.assert_array_equal(mask[sure], expected[sure])

    height, width = instances.image_size
    assert output["image"].shape == (3, height, width)
    # Fit pixel place -> original place along each axis, away from the borders, and send the box through its inverse
    columns, rows = np.arange(width)[10:-10] + 0.5, np.arange(height)[10:-10] + 0.5
    slope_x, start_x = np.polyfit(columns, np.median(x, axis=0)[10:-10] + 0.5, 1)
    slope_y, start_y = np.polyfit(rows, np.median(y, axis=1)[10:-10] + 0.5, 1)
    xs = np.sort([(20 - start_x) / slope_x, (120 - start_x) / slope_x]).clip(0, width)
    ys = np.sort([(30 - start_y) / slope_y, (130 - start_y) / slope_y]).clip(0, height)
    box = instances.gt_boxes.tensor[0].numpy()
    np.testing.assert_allclose(box, [xs[0], ys[0], xs[1], ys[1]], atol=1.5)
    if mask.any():  # the box holds the mask, up to a pixel for each step of nearest-neighbour sampling
        rows, columns = np.nonzero(mask)
        assert box[0] - 3 <= columns.min() and columns.max() + 1 <= box[2] + 3
        assert box[1] - 3 <= rows.min() and rows.max() + 1 <= box[3] + 3


def test_flip_keeps_the_area(entry):
    output = make_mapper(T.RandomFlip(1.0))(entry)["instances"]
    np.testing.assert_array_equal(output.gt_masks.tensor[0], polygon_mask()[:, ::-1])
    assert output.gt_boxes.tensor.tolist() == [[WIDTH - 120, 30, WIDTH - 20, 130]]


class FixedCrop(T.Augmentation):
    def __init__(self, x, y, w, h):
        super().__init__()
        self.window = (x, y, w, h)

    def get_transform(self, image):
        return T.CropTransform(*self.window)


def test_boxes_are_not_tightened_after_a_crop(entry):
    # Of the triangle only the corner at (120, 40) is in the window; the box stays the annotation's
    instances = make_mapper(FixedCrop(100, 20, 60, 120))(entry)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 10, 20, 110]]
    ys, _ = np.nonzero(instances.gt_masks.tensor[0].numpy())
    assert ys.max() < 80


def test_instances_outside_the_crop_are_dropped_and_without_a_mask_kept(entry):
    far = annotation(bbox=[150, 100, 40, 40], segmentation=[[150, 100, 190, 100, 190, 140]], category_id=0)
    entry["annotations"].append(far)
    assert make_mapper(FixedCrop(125, 0, 75, 150))(entry)["instances"].gt_classes.tolist() == [0]
    assert len(make_mapper(FixedCrop(120, 0, 30, 150))(entry)["instances"]) == 0  # only touching
    # A window in the box's lower right corner, where the triangle is not
    instances = make_mapper(FixedCrop(112, 110, 20, 20))(entry)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 8, 20]] and not instances.gt_masks.tensor.any()


def test_instances_without_a_pixel_are_dropped_if_asked(entry):
    entry["annotations"].insert(0, annotation(bbox=[112, 110, 20, 20], segmentation=[[112, 110, 132, 110, 132, 130]]))
    entry["annotations"][0]["category_id"] = 0
    instances = make_mapper(FixedCrop(112, 110, 20, 20), drop_empty_masks=True)(entry)["instances"]
    assert instances.gt_classes.tolist() == [0]
    assert len(instances.gt_boxes) == len(instances.gt_masks) == 1 and instances.gt_masks.tensor.any()
    cfg = get_cfg()
    assert not InstanceMapper(cfg).drop_empty_masks
    cfg.INPUT.DROP_EMPTY_MASKS = True
    assert InstanceMapper(cfg).drop_empty_masks


@pytest.mark.parametrize("form", ["polygon", "arrays", "compressed", "bytes", "uncompressed", "uint8", "bool"])
def test_forms_of_segmentation(entry, form):
    mask = polygon_mask()
    rle = mask_util.encode(np.asfortranarray(mask))
    pixels = np.concatenate([[0], mask.reshape(-1, order="F")])
    edges = np.flatnonzero(np.diff(pixels)).tolist()
    forms = {
        "polygon": [POLYGON],
        "arrays": [np.array(POLYGON)],
        "compressed": {"size": rle["size"], "counts": rle["counts"].decode()},
        "bytes": rle,
        "uncompressed": {"size": rle["size"], "counts": np.diff([0, *edges, mask.size]).tolist()},
        "uint8": mask,
        "bool": mask.astype(bool),
    }
    entry["annotations"] = [annotation(segmentation=forms[form])]
    instances = make_mapper(ResizeShortestSide([75]))(entry)["instances"]
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=(75, 100))[0, 0]
    np.testing.assert_array_equal(instances.gt_masks.tensor[0], expected)


def test_parts_of_a_mask_are_united(entry):
    parts = [[10, 10, 60, 10, 60, 60, 10, 60], [40, 40, 90, 40, 90, 90, 40, 90]]
    entry["annotations"] = [annotation(bbox=[10, 10, 80, 80], segmentation=parts)]
    (mask,) = make_mapper()(entry)["instances"].gt_masks.tensor
    assert mask.sum() == 2 * 50**2 - 20**2


@pytest.mark.parametrize("mode", [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS])
@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_forms_of_boxes(entry, mode, kind):
    box = [20, 30, 120, 130] if mode == BoxMode.XYXY_ABS else [20, 30, 100, 100]
    entry["annotations"] = [annotation(bbox=kind(box), bbox_mode=mode)]
    assert make_mapper()(entry)["instances"].gt_boxes.tensor.tolist() == [[20, 30, 120, 130]]


def test_boxes_are_clipped(entry):
    entry["annotations"] = [annotation(bbox=[-10, 30, 130, 125])]
    assert make_mapper()(entry)["instances"].gt_boxes.tensor.tolist() == [[0, 30, 120, 150]]


LINE = annotation(bbox=[20, 30, 10, 0], segmentation=[[20, 30, 30, 30, 25, 30]])


@pytest.mark.parametrize("annotations", [[], [annotation(iscrowd=1)], [LINE]])
@pytest.mark.parametrize("use_masks", [True, False])
def test_images_without_instances(entry, annotations, use_masks):
    entry["annotations"] = annotations
    resize = ResizeShortestSide([75])
    instances = make_mapper(T.RandomFlip(1.0), resize, FixedCrop(0, 0, 50, 60), use_masks=use_masks)(entry)["instances"]
    assert len(instances) == 0 and instances.image_size == (60, 50)
    assert instances.gt_boxes.tensor.shape == (0, 4) and instances.gt_boxes.tensor.dtype == torch.float32
    assert instances.gt_classes.shape == (0,) and instances.gt_classes.dtype == torch.int64
    assert instances.has("gt_masks") == use_masks
    if use_masks:
        assert instances.gt_masks.tensor.shape == (0, 60, 50)


DEGENERATE = [[20, 30, 0, 100], [20, 30, 100, -5], [300, 30, 10, 10], [float("nan"), 30, 10, 10]]


@pytest.mark.parametrize("box", DEGENERATE)
def test_degenerate_boxes_become_those_of_the_masks_with_one_word(entry, box, caplog):
    entry["annotations"] = [annotation(), annotation(bbox=box, category_id=0)]
    mapper = make_mapper(T.RandomFlip(1.0), ResizeShortestSide([75]))
    mapper_module.logger.addHandler(caplog.handler)  # whether or not the package's log goes to the root
    try:
        for _ in range(3):
            instances = mapper(entry)["instances"]
    finally:
        mapper_module.logger.removeHandler(caplog.handler)
    assert instances.gt_classes.tolist() == [1, 0] and len(instances.gt_masks) == 2
    assert instances.gt_boxes.tensor[0].equal(instances.gt_boxes.tensor[1])
    messages = {record.getMessage() for record in caplog.records}
    assert len(messages) == 1 and f"{entry['file_name']} (image id 7)" in messages.pop()
    entry["annotations"][1].pop("segmentation")
    with pytest.raises(ValueError, match="annotation 1: 'bbox' is .* and there is no mask. Give the box or remove"):
        mapper(entry)


def test_cap_on_instances(entry):
    squares = [[x, 10, x + 10, 10, x + 10, 20, x, 20] for x in range(0, 120, 12)]
    entry["annotations"] = [
        annotation(bbox=[s[0], 10, 10, 10], segmentation=[s], category_id=i) for i, s in enumerate(squares)
    ]
    np.random.seed(0)
    mapper = make_mapper(max_instances=4)
    seen = []
    for _ in range(30):
        instances = mapper(entry)["instances"]
        assert len(instances) == len(instances.gt_masks) == 4
        seen.extend(instances.gt_classes.tolist())
        for i, mask, box in zip(instances.gt_classes, instances.gt_masks.tensor, instances.gt_boxes.tensor):
            assert box.tolist() == [12 * i, 10, 12 * i + 10, 20] and mask[10:20, 12 * i : 12 * i + 10].all()
    assert set(seen) == set(range(10))
    assert len(make_mapper(max_instances=10)(entry)["instances"]) == 10


def broken_file(entry):
    with open(entry["file_name"], "r+b") as file:
        file.truncate(200)


def no_image(entry):
    with open(entry["file_name"], "wb") as file:
        file.write(b"this is text")


FAULTS = {
    "missing file": (lambda e: e.update(file_name=e["file_name"] + ".gone"), "no such file.*DETECTRON2_DATASETS"),
    "cut-off file": (broken_file, "cannot be decoded.*Replace it"),
    "no image": (no_image, "cannot be decoded.*Replace it"),
    "no annotations": (lambda e: e.pop("annotations"), "no 'annotations'.*empty list"),
    "no segmentation": (lambda e: e["annotations"][0].pop("segmentation"), "no segmentation.*MASK_BRANCH.NAME none"),
    "empty segmentation": (
        lambda e: e["annotations"][0].update(segmentation=[]),
        "no segmentation.*MASK_BRANCH.NAME none",
    ),
    "class too high": (lambda e: e["annotations"][0].update(category_id=3), "category 3.*0 to 2.*NUM_CLASSES"),
    "class negative": (lambda e: e["annotations"][0].update(category_id=-1), "category -1.*0 to 2.*NUM_CLASSES"),
    "size of mask": (
        lambda e: e["annotations"][0].update(segmentation=np.ones((4, 5), bool)),
        r"\(4, 5\).*\(150, 200\).*Make",
    ),
    "type": (lambda e: e["annotations"][0].update(segmentation="x"), "type str.*Use"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_name_the_image_and_the_remedy(entry, fault):
    change, message = FAULTS[fault]
    change(entry)
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        make_mapper(num_classes=3)(entry)
    assert f"{entry['file_name']} (image id 7)" in str(error.value)


def test_size_in_the_annotation_must_be_the_files(entry):
    entry["width"] = 201
    with pytest.raises(Exception, match=r"ramp.png \(image id 7\): the image is 200x150.*says 201x150. Correct"):
        make_mapper()(entry)


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4]], [[1.0] * 7], [["a"] * 6]])
def test_masks_that_nobody_can_read_are_not_trained_on(entry, segmentation):
    entry["annotations"].append(annotation(segmentation=segmentation, category_id=0))
    assert make_mapper()(entry)["instances"].gt_classes.tolist() == [1]


def test_grey_and_palette_files_become_three_channels(entry):
    for mode in ("L", "P"):
        Image.open(entry["file_name"]).convert(mode).save(entry["file_name"])
        assert make_mapper()(entry)["image"].shape == (3, HEIGHT, WIDTH)


def test_mapper_travels_to_worker_processes(entry):
    mapper = pickle.loads(pickle.dumps(make_mapper(ResizeShortestSide([75]))))
    assert mapper(entry)["image"].shape == (3, 75, 100)


def test_result_depends_on_the_seed_alone(entry):
    mapper = make_mapper(T.RandomFlip(), ResizeShortestSide([60, 70, 80, 90, 100]), RandomCropOfRange(30, 60))
    outputs = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        outputs.append(mapper(entry))
    assert outputs[0]["image"].equal(outputs[1]["image"])
    assert outputs[0]["instances"].gt_masks.tensor.equal(outputs[1]["instances"].gt_masks.tensor)
    assert outputs[0]["image"].shape != outputs[2]["image"].shape


def test_skip_empty(entry):
    """Only where it is asked for, and only in training."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ISDA"
    empty = {**entry, "annotations": []}
    assert len(InstanceMapper(cfg, True)(empty)["instances"]) == 0
    cfg.INPUT.REPLACE_EMPTY = True
    assert InstanceMapper(cfg, True)(empty) is None
    assert InstanceMapper(cfg, True)(entry) is not None
    assert InstanceMapper(cfg, False)(empty) is not None
