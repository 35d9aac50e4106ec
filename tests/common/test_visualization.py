import json

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from PIL import Image

from querymask.common import visualization
from querymask.common.visualization import (
    LONGER_SIDE_RANGE,
    PictureNames,
    class_colour,
    contact_sheet,
    draw_instances,
    plot_curves,
    read_metrics,
    save_comparison,
)

HEIGHT, WIDTH = 300, 512  # such that pictures are drawn at this very size
IMAGE = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
SQUARE = [100.0, 50.0, 300.0, 50.0, 300.0, 250.0, 100.0, 250.0]


class Metadata:
    def __init__(self, **values):
        self.get = values.get


def predictions(*fields, scores=(0.9, 0.2), size=(HEIGHT, WIDTH)):
    instances = Instances(size)
    masks = torch.zeros(len(scores), *size, dtype=torch.bool)
    boxes = torch.zeros(len(scores), 4)
    for i in range(len(scores)):
        masks[i, 50 : 250 - 10 * i, 100 + 10 * i : 300] = True
        boxes[i] = torch.tensor([100.0 + 10 * i, 50.0, 300.0, 250.0 - 10 * i])
    values = {"pred_boxes": Boxes(boxes), "scores": torch.tensor(scores), "pred_masks": masks}
    values["pred_classes"] = torch.arange(len(scores))
    for name, value in values.items():
        if not fields or name in fields:
            instances.set(name, value)
    return instances


def annotations():
    shared = {"bbox": [100, 50, 200, 200], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return [{**shared, "segmentation": [SQUARE]}]


def changed(picture):
    return (picture != IMAGE).any(axis=-1)


def test_masks_boxes_and_labels_are_drawn_where_they_are():
    picture = draw_instances(IMAGE, predictions(scores=(0.9,)), ["cat"])
    assert picture.shape == IMAGE.shape and picture.dtype == np.uint8
    mask = changed(picture)
    assert mask[52:248, 102:298].all()
    assert not mask[:20].any() and not mask[260:].any() and not mask[:, :90].any() and not mask[:, 310:].any()
    tint = picture[150, 200].astype(int) - 128
    assert np.corrcoef(tint, np.array(class_colour(0)) - 128.0)[0, 1] > 0.99
    # The label stands above the box, in the colour of the class
    label = picture[30:50, 100:160]
    assert (label == class_colour(0)).all(axis=-1).mean() > 0.3


def test_labels_stand_at_masks_where_there_are_no_boxes():
    """No rectangle is drawn; the label is where that of the mask's bounding box would be."""
    named, plain = (
        draw_instances(IMAGE, predictions("pred_masks", *f, scores=(0.9,)), ["cat"]) for f in (["pred_classes"], [])
    )
    label = (named != plain).any(-1)[:45]  # above the mask
    columns = np.flatnonzero(label.any(0))
    assert columns.min() >= 98 and columns.max() < 200
    empty = predictions("pred_masks", "pred_classes", scores=(0.9,))
    empty.pred_masks[:] = False
    assert not changed(draw_instances(IMAGE, empty, ["cat"])).any()


def test_score_threshold():
    drawn = draw_instances(IMAGE, predictions(scores=(0.5, 0.25)), score_threshold=0.5)
    np.testing.assert_array_equal(drawn, draw_instances(IMAGE, predictions(scores=(0.5,))))
    assert not changed(draw_instances(IMAGE, predictions(), score_threshold=0.95)).any()


@pytest.mark.parametrize("missing", ["pred_boxes", "pred_classes", "pred_masks", "scores"])
def test_any_field_may_lack(missing):
    fields = {"pred_boxes", "pred_classes", "pred_masks", "scores"} - {missing}
    picture = draw_instances(IMAGE, predictions(*fields), ["cat", "dog"])
    inside = changed(picture)[100:200, 150:290]
    assert inside.all() if missing != "pred_masks" else not inside.any()


def test_nothing_to_draw():
    assert not changed(draw_instances(IMAGE, Instances((HEIGHT, WIDTH)))).any()
    assert not changed(draw_instances(IMAGE, predictions(scores=()), ["cat"])).any()
    assert not changed(draw_instances(IMAGE, [])).any()
    empty = predictions("pred_masks", scores=(0.5,))
    empty.pred_masks[:] = False
    assert not changed(draw_instances(IMAGE, empty)).any()


@pytest.mark.parametrize("form", ["bitmasks", "polygons"])
def test_ground_truth_instances_look_like_annotations(form):
    instances = Instances((HEIGHT, WIDTH))
    instances.gt_boxes = Boxes(torch.tensor([[100.0, 50.0, 300.0, 250.0]]))
    instances.gt_classes = torch.tensor([0])
    polygons = PolygonMasks([[np.array(SQUARE)]])
    instances.gt_masks = polygons if form == "polygons" else BitMasks.from_polygon_masks(polygons, HEIGHT, WIDTH)
    names = ["cat", "dog"]
    picture = draw_instances(IMAGE, annotations(), names)
    np.testing.assert_array_equal(draw_instances(IMAGE, instances, names), picture)
    assert changed(picture)[100:200, 150:250].all()


def test_crowds_are_grey():
    crowd = annotations()
    crowd[0]["iscrowd"] = 1
    picture = draw_instances(IMAGE, crowd, ["cat"])
    pixel = picture[150, 200].astype(int)
    assert changed(picture)[150, 200] and np.ptp(pixel) == 0


def test_annotations_without_segmentation_or_box():
    (annotation,) = annotations()
    box_only = {key: value for key, value in annotation.items() if key != "segmentation"}
    mask_only = {key: value for key, value in annotation.items() if key != "bbox"}
    assert not changed(draw_instances(IMAGE, [box_only]))[100:200, 150:250].any()
    assert changed(draw_instances(IMAGE, [box_only])).any()
    assert changed(draw_instances(IMAGE, [mask_only]))[100:200, 150:250].all()


@pytest.mark.parametrize("size", [(40, 64), (3000, 4000), (1, 5000), (700, 3)])
def test_size_of_the_picture(size):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
    instances.pred_masks = torch.ones(1, *size, dtype=torch.bool)
    instances.pred_classes = torch.tensor([0])
    picture = draw_instances(np.zeros((*size, 3), np.uint8), instances)
    assert LONGER_SIDE_RANGE[0] <= max(picture.shape) <= LONGER_SIDE_RANGE[1]
    ratio = picture.shape[1] / picture.shape[0]
    assert picture.shape[0] == 1 or picture.shape[1] < 5 or ratio == pytest.approx(size[1] / size[0], rel=0.02)
    assert (picture.max(axis=-1) > 0).mean() > 0.95


def test_labels_do_not_cover_one_another():
    boxes = Boxes(torch.tensor([[100.0, 50.0, 300.0, 250.0]] * 5))
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes, instances.pred_classes = boxes, torch.arange(5)
    picture = draw_instances(IMAGE, instances, list("abcde"))
    for index in range(5):
        assert (picture == class_colour(index)).all(axis=-1).sum() > 80, index


def crowd(count, side, classes):
    """A grid of squares without masks, of classes in turn."""
    columns = 20
    places = torch.tensor([[25.0 * (i % columns), 25.0 * (i // columns)] for i in range(count)])
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.cat((places, places + side), 1))
    instances.scores = torch.full((count,), 0.9)
    instances.pred_classes = torch.arange(count) % classes
    return instances


@pytest.mark.parametrize(
    ("count", "side", "classes", "written"),
    [
        (14, 10, 1, ["a 0.90"] * 14),  # few
        (200, 10, 1, []),
        (200, 10, 3, ["a", "b", "c"]),
        (15, 150, 2, ["a 0.90", "b 0.90"] * 7 + ["a 0.90"]),  # labels are small beside the objects
    ],
)
def test_labels_of_crowded_images(count, side, classes, written, monkeypatch):
    texts = []
    monkeypatch.setattr(visualization.fonts, "write", lambda draw, place, text, *rest: texts.append(text))
    draw_instances(IMAGE, crowd(count, side, classes), ["a", "b", "c"][:classes])
    assert sorted(texts) == sorted(written)


def test_class_colours_differ():
    colours = np.array([class_colour(i) for i in range(80)])
    assert len({tuple(c) for c in colours.tolist()}) == 80
    first = colours[:6].astype(float)
    distances = np.linalg.norm(first[:, None] - first[None], axis=-1) + 1000 * np.eye(6)
    assert distances.min() > 80


def test_instances_of_a_single_class_have_their_own_colours():
    instances = predictions("pred_masks", "pred_classes", scores=(1.0, 1.0))
    instances.pred_classes[:] = 0
    instances.pred_masks[1, :, :200] = False
    instances.pred_masks[0, :, 200:] = False
    one, several = draw_instances(IMAGE, instances, ["balloon"]), draw_instances(IMAGE, instances, ["a", "b"])
    assert (one[150, 150] != one[150, 250]).any() and (several[150, 150] == several[150, 250]).all()


def test_wrong_inputs():
    with pytest.raises(ValueError, match="uint8 image"):
        draw_instances(IMAGE.astype(np.float32), [])
    with pytest.raises(ValueError, match=r"\(300, 512\).*Rescale"):
        draw_instances(IMAGE, Instances((10, 20)))
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], 3)


def test_contact_sheet():
    images = [np.full((20 + i, 30, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.shape[1] > 90 and 44 < sheet.shape[0] < 120
    for i in range(5):
        assert (sheet == 10 * i).all(axis=-1).sum() == images[i][..., 0].size
    titled = contact_sheet(images, columns=3, titles=list("abcde"))
    assert titled.shape[0] == sheet.shape[0] + 60


@pytest.mark.parametrize("fields", [(), ("pred_boxes", "pred_classes", "scores")])
def test_comparison(tmp_path, fields):
    file_name = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(file_name)
    entry = {"file_name": str(file_name), "height": HEIGHT, "width": WIDTH, "annotations": annotations()}
    metadata = Metadata(thing_classes=["cat", "dog"])
    path = tmp_path / "new" / "both.png"
    save_comparison(entry, predictions(*fields), metadata, path, score_threshold=0.5)
    both = np.asarray(Image.open(path))
    assert both.shape[1] > 2 * WIDTH and both.shape[0] < 1.3 * HEIGHT
    # Ground truth to the left, predictions to the right
    truth, predicted = (
        draw_instances(IMAGE, annotations(), ["cat", "dog"]),
        draw_instances(IMAGE, predictions(*fields), ["cat", "dog"], 0.5),
    )
    top, left = both.shape[0] - HEIGHT - 12, 12
    np.testing.assert_array_equal(both[top : top + HEIGHT, left : left + WIDTH], truth)
    np.testing.assert_array_equal(both[top : top + HEIGHT, -12 - WIDTH : -12], predicted)

    del entry["annotations"]
    save_comparison(entry, predictions(scores=()), Metadata(), path)
    assert np.asarray(Image.open(path)).shape[1] < 1.2 * WIDTH


def metrics_lines():
    lines = [{"iteration": i, "total_loss": 9.0 - i, "loss_ce": 1.0, "loss_ce_0": 1.0, "lr": 0.1} for i in range(8)]
    lines.append({"iteration": 7, "bbox/AP": 20.0, "bbox/AP50": 40.0, "bbox/AP-cat": 1.0, "segm/AP": float("nan")})
    return [json.dumps(line) for line in lines]


def test_read_metrics(tmp_path):
    file = tmp_path / "metrics.json"
    repeated = json.dumps({"iteration": 3, "total_loss": 100.0})
    file.write_text("\n".join([*metrics_lines(), repeated, '{"iteration": 9, "total_l']))
    series = read_metrics(file)
    assert series["total_loss"] == [(i, 100.0 if i == 3 else 9.0 - i) for i in range(8)]
    assert series["bbox/AP50"] == [(7, 40.0)] and "iteration" not in series
    file.write_text("\n".join(["not json", *metrics_lines()]))
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(file)


def test_curves(tmp_path, monkeypatch):
    file, path = tmp_path / "metrics.json", tmp_path / "new" / "curves.png"
    drawn = {}
    for kind in ("losses", "precisions"):
        plot = getattr(visualization, f"_plot_{kind}")
        monkeypatch.setattr(
            visualization, f"_plot_{kind}", lambda a, m, k=kind, p=plot: (drawn.update({k: sorted(m)}), p(a, m))
        )
    file.write_text("\n".join(metrics_lines()))
    plot_curves(file, path)
    assert drawn == {"losses": ["loss_ce", "total_loss"], "precisions": ["bbox/AP", "bbox/AP50"]}
    both = Image.open(path)
    file.write_text("\n".join(metrics_lines()[:-1]))
    plot_curves(file, path)
    assert Image.open(path).width < 0.6 * both.width
    file.write_text('{"iteration": 1, "panoptic_seg/PQ": 50.0, "panoptic_seg/PQ_th": 40.0, "panoptic_seg/RQ": 1.0}')
    plot_curves(file, path)
    assert drawn["precisions"] == ["panoptic_seg/PQ", "panoptic_seg/PQ_th"]
    file.write_text('{"iteration": 1, "lr": 0.1}')
    with pytest.raises(ValueError, match="neither losses nor AP"):
        plot_curves(file, path)


def test_smoothing():
    values = np.r_[np.zeros(100), np.ones(100)]
    values[20] = np.nan
    smooth = visualization._smooth(values)
    assert np.isfinite(smooth).all() and smooth[0] == 0 and smooth[-1] == 1
    assert 0.4 < smooth[100] < 0.6  # no lag
    np.testing.assert_array_equal(visualization._smooth([3.0, 1.0]), [3.0, 1.0])


def test_each_image_has_a_name_of_its_own() -> None:
    files = ["cam1/1.png", "cam2/1.png", "cam2/1.jpg", "1_2.png", "A.png", "x/a.png", "cam1\\1.png", "b.c.png", ".png"]
    names = PictureNames(".jpg")
    assert [names(file) for file in files] == [
        "1.jpg",
        "1_2.jpg",
        "1_3.jpg",
        "1_2_2.jpg",
        "A.jpg",
        "a_2.jpg",  # where case does not matter, a.jpg would overwrite A.jpg
        "1_4.jpg",
        "b.c.jpg",
        ".png.jpg",
    ]
