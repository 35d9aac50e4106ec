"""The page to try models on: what it shows and gives, in a browser where there is one; and its parts without."""

import argparse
import importlib.util
import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from devices import DEVICE
from PIL import Image
from pycocotools.coco import COCO
from tiny_configs import REDUCED
from tiny_models import small_solq

import querymask
from querymask import serve
from querymask.common.data.image_files import ImageFileError
from querymask.common.visualization import draw_instances
from querymask.serve import (
    DETECTIONS,
    Choice,
    ServedModel,
    draw_picture,
    draw_svg,
    look,
    outline,
    parse_address,
    write_files,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cat", "dog", "<b>eel", "fly"]
WAIT = 60_000  # milliseconds: other tests may take the processor
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def cfg() -> CfgNode:
    return small_solq(NAMES)


@pytest.fixture(scope="module")
def models(cfg: CfgNode) -> list[ServedModel]:
    """Two of random weights that differ, with scores from 0 to 1."""
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = ServedModel.from_config(cfg, f"model {seed}")
        for name, parameter in model.predictor.model.named_parameters():
            if "class_embed" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        made.append(model)
    return made


def picture(path: Path, height: int = 50, width: int = 70, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    Image.fromarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST)).save(path)
    return path


def labels(svg: str) -> list[str]:
    return sorted(re.findall(r'data-label="([^"]*)"', svg))


def expected_labels(model: ServedModel, path: Path, score: float, classes: list[str]) -> list[str]:
    found = model.predictor(path, score_threshold=score)
    texts = [f"{name} {s:.2f}" for name, s in zip(found.names, found.scores) if not classes or name in classes]
    return sorted(text.replace("<", "&lt;").replace(">", "&gt;") for text in texts)


def test_score_and_classes_choose(models: list[ServedModel], tmp_path: Path) -> None:
    """As the predictor with that threshold; what a class is called is text, whatever it is."""
    path = picture(tmp_path / "a.png")
    seen = look(models, str(path))
    for model, found in zip(models, seen.found):
        scores, some = found.detections.scores, found.detections.names[1]
        middle = round(float(scores[len(scores) // 2]), 2)
        for score, classes in ((0.0, []), (middle, []), (0.0, [some]), (1.0, []), (0.0, ["<b>eel"])):
            svg = draw_svg(found, Choice(score, classes), model)
            assert labels(svg) == expected_labels(model, path, score, classes)
            assert "<b>" not in svg and f"{len(labels(svg))} of {len(scores)} detections" in svg


def test_outlines_are_those_of_the_masks(models: list[ServedModel], tmp_path: Path) -> None:
    """Filled by the rule of even and odd, with the pixels that they pass through: also of rings and of two parts."""
    (found, _) = look(models, str(picture(tmp_path / "a.png", 90, 120))).found
    ring = np.zeros(found.detections.size, np.uint8)
    cv2.circle(ring, (60, 45), 30, 1, 9)
    ring[5:9, 5:20] = 1
    masks = [*map(found.detections.masks.decode, range(3)), ring]
    place = type(found.detections.masks).place
    detections = replace(found.detections, masks=place(torch.tensor(np.array(masks)).bool(), 0, 0, ring.shape))
    for row, mask in enumerate(masks):
        contours = [
            np.array(re.findall(r"([\d.]+) ([\d.]+)", part), float) - 0.5
            for part in outline(detections, row).split("Z")[:-1]
        ]
        drawn = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [contour.astype(np.int32) for contour in contours], 1)
        assert mask.any() and (drawn == mask).all()


def test_without_masks_the_boxes_are_outlined(models: list[ServedModel], tmp_path: Path) -> None:
    (found, _) = look(models, str(picture(tmp_path / "a.png"))).found
    boxes = np.float32([[1, 2, 30.25, 40]] * len(found.detections))
    detections = replace(found.detections, masks=None, boxes=boxes)
    assert outline(detections, 0) == "M1.0 2.0H30.2V40.0H1.0Z"
    svg = draw_svg(replace(found, detections=detections), Choice(0, []), models[0])
    assert len(labels(svg)) == len(detections)


@pytest.mark.parametrize("size", [(50, 70), (1000, 1600)])
def test_files(models: list[ServedModel], tmp_path: Path, size: tuple[int, int]) -> None:
    """COCO's are in the pixels of the uploaded file, the picture is that of the demo."""
    (tmp_path / "out").mkdir()
    path = picture(tmp_path / "a.b.png", *size)
    seen = look(models, str(path))
    files = write_files(str(tmp_path / "out"), seen, 1, Choice(0.5, []), DETECTIONS, models)
    assert [Path(file).name for file in files] == ["a.b.2.detections.json", "a.b.2.images.json", "a.b.2.png"]
    predictor = models[1].predictor
    found = predictor(path, score_threshold=0.5)
    coco = COCO(files[1])
    assert coco.loadImgs(1)[0] == {"id": 1, "file_name": "a.b.png", "height": size[0], "width": size[1]}
    assert json.loads(Path(files[0]).read_text()) == found.to_coco(1, [c["id"] for c in models[1].categories], size)
    assert len(coco.loadRes(files[0]).getAnnIds()) == len(found) > 0
    with Image.open(files[2]) as drawn:
        expected = draw_instances(predictor.prepare(predictor.reader(path))[1], found.to_instances(), NAMES)
        assert (np.asarray(drawn) == expected).all()


def test_files_that_cannot_be_used(cfg: CfgNode, models: list[ServedModel], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageFileError, match="Pillow knows no such image format"):
        look(models, str(tmp_path / "broken.jpg"))
    assert models[0].predictor.reader.max_pixels == serve.MOST_PIXELS
    small = cfg.clone()
    small.INPUT.MAX_PIXELS = 100
    with pytest.raises(ImageFileError, match="50 are 3500 pixels, and INPUT.MAX_PIXELS is 100"):
        look([ServedModel.from_config(small, "")], str(picture(tmp_path / "a.png")))


@pytest.mark.parametrize(
    ("method", "view"),
    [("solq", "coefficients"), ("isda", "reference_points"), ("istr", "stages"), ("effseg", "refinement")],
)
def test_every_method_has_its_view(method: str, view: str, tmp_path: Path) -> None:
    """A picture of its own."""
    small = querymask.get_cfg()
    small.merge_from_file(ROOT / f"projects/{method}/configs/{method}_shapes.yaml")
    reduced = {**REDUCED[method], "MODEL.DEVICE": DEVICE, "MODEL.WEIGHTS": "", "INPUT.MIN_SIZE_TEST": 64}
    small.merge_from_list([item for pair in reduced.items() for item in pair])
    model = ServedModel.from_config(small, "")
    assert model.views == [view]
    (found,) = look([model], str(picture(tmp_path / "a.png"))).found
    shown, detections = (draw_picture(found, Choice(0, []), shown, model) for shown in (view, DETECTIONS))
    assert shown.dtype == np.uint8 and shown.shape[2] == 3
    assert shown.shape != detections.shape or (shown != detections).any()


def test_views_and_detections_take_turns(models: list[ServedModel], tmp_path: Path) -> None:
    """A view changes the network while it looks: two visitors at once get what each would get alone."""
    model = models[0]
    found = look(models, str(picture(tmp_path / "a.png"))).found[0]
    inside: list[int] = []
    most = []

    def view(network: torch.nn.Module, *arguments: Any) -> np.ndarray:
        inside.append(1)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()
        return found.image

    handle = model.predictor.model.register_forward_pre_hook(lambda *_: most.append(2 * len(inside)))
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(model.predictor.draw_view, view, found.item, found.image, 0.5)
                pool.submit(model.predictor.detect, [found.item])
    finally:
        handle.remove()
    assert sorted(most) == [0] * 8 + [1] * 8


def test_addresses() -> None:
    assert parse_address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert parse_address("[::1]:81") == ("::1", 81)
    assert parse_address(":82") == ("127.0.0.1", 82)
    assert parse_address("my.host") == ("my.host", 7860)
    for text in ("a:b", "http://a:1", "a/b", "a:99999", "me@a:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no HOST:PORT, such as 127.0.0.1:7860"):
            parse_address(text)


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_that_serves", ROOT / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_serves(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it hands on: the models of --run or --config-file and --compare, and where."""
    demo = load_demo()
    served: list[Any] = []
    monkeypatch.setattr(demo, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save({"model": ServedModel.from_config(cfg, "").predictor.model.state_dict()}, run / name)
    (run / "config.yaml").write_text(cfg.dump())
    (run / "last_checkpoint").write_text("b.pth")
    a, b = str(run / "a.pth"), str(run / "b.pth")
    assert demo.main(["--run", str(run), "--serve", "--compare", a, "--opts", "INPUT.MIN_SIZE_TEST", "60"]) == 0
    config = ["--config-file", str(run / "config.yaml"), "--serve", "0.0.0.0:90", "--compare"]
    assert demo.main([*config, str(run), "--confidence-threshold", "0.6", "--opts", "MODEL.WEIGHTS", a]) == 0
    assert [arguments[1:] for arguments in served] == [("127.0.0.1", 7860, 0.3), ("0.0.0.0", 90, 0.6)]
    assert [[model.title for model in arguments[0]] for arguments in served] == [[b, a], [a, b]]
    assert demo.main([*config, str(tmp_path / "none.pth"), "--opts", "MODEL.WEIGHTS", a]) == 1
    assert "none.pth" in capsys.readouterr().err
    for extra, message in (
        (["--serve", "--output", "a"], "leave out --output, --view and --label-images"),
        (["--serve", "a:b"], "is no HOST:PORT"),
        (["--input", "a.png", "--compare", a], "--compare is for the page"),
    ):
        with pytest.raises(SystemExit):
            demo.main(["--run", str(run), *extra])
        assert message in capsys.readouterr().err


def test_gradio_is_named_where_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"needs the package gradio .*: pip install 'querymask\[serve\]'"):
        serve.import_gradio()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (Debian, Ubuntu: apt install chromium)")
    with playwright.sync_playwright() as started:
        # Its own sandbox needs rights that containers lack; it opens this page alone
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def port(models: list[ServedModel]) -> Iterator[int]:
    """Of the page of two models, as ``serve`` launches it, but for files above 1 MB."""
    gradio = pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    page = serve.build_page(models, 0.5)
    options = {**serve.LAUNCH, "max_file_size": 2**20}
    page.launch(server_name="127.0.0.1", server_port=number, prevent_thread_lock=True, quiet=True, **options)
    yield number
    page.close()
    gradio.close_all()


@pytest.fixture
def visit(browser: "Browser", port: int) -> "Iterator[Callable[[], Page]]":
    """Function that opens the page as a new visitor; requests beyond this machine fail the test."""
    contexts, foreign = [], []

    def note(request: Any) -> None:
        if not request.url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")):
            foreign.append(request.url)

    def open_page() -> "Page":
        size = {"width": 1200, "height": 1000}
        contexts.append(browser.new_context(base_url=f"http://127.0.0.1:{port}", viewport=size))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", note)
        page.goto("/")
        page.wait_for_selector("input[type=file]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign


def give(page: "Page", path: Path) -> None:
    page.set_input_files("input[type=file]", str(path))


def wait_for_labels(page: "Page", number: int, expected: list[str]) -> None:
    """Until the objects that a model's column shows are these."""
    script = f"""expected => {{
        const shown = document.querySelectorAll("#model-{number} svg[role=img] .object");
        const found = [...shown].map(object => object.dataset.label).sort();
        return document.querySelector("#model-{number} svg[role=img]") && found.join("|") === expected.join("|")
    }}"""
    texts = sorted(text.replace("&lt;", "<").replace("&gt;", ">") for text in expected)
    page.wait_for_function(script, arg=texts)


def test_page(models: list[ServedModel], visit: "Callable[[], Page]", tmp_path: Path) -> None:
    """An image is dropped; score, classes and pointer do what they say; views and files come."""
    path = picture(tmp_path / "a.png")
    page = visit()
    give(page, path)
    for number, model in enumerate(models):
        wait_for_labels(page, number, expected_labels(model, path, 0.5, []))

    page.get_by_label("number input for least score").fill("0")
    for number, model in enumerate(models):
        wait_for_labels(page, number, expected_labels(model, path, 0, []))
    chosen = look(models, str(path)).found[0].detections.names[0]
    page.get_by_role("listbox", name="classes").or_(page.get_by_label("classes")).first.click()
    page.get_by_role("option", name=chosen).click()
    for number, model in enumerate(models):
        wait_for_labels(page, number, expected_labels(model, path, 0, [chosen]))

    thing = page.locator("#model-0 .object").last  # the smallest: none is above it
    assert not thing.locator("text").is_visible()
    thing.locator("path").hover(force=True)
    thing.locator("text").wait_for(state="visible")

    page.locator("#model-1").get_by_label("coefficients").check()
    page.wait_for_function("() => document.querySelector('#model-1 .found img[alt=coefficients]')?.naturalWidth > 500")
    assert page.locator("#model-0 svg[role=img]").count() == 1  # the other column is as it was

    page.locator("#model-0").get_by_role("button", name="make files").click()
    links = page.locator("#model-0 a[download]")
    links.nth(2).wait_for()
    contents = {}
    for link in links.all():
        with page.expect_download() as download:
            link.click()
        contents[download.value.suggested_filename] = download.value.path()
    results = json.loads(contents["a.1.detections.json"].read_text())
    coco = COCO(contents["a.1.images.json"])
    texts = [f"{coco.cats[r['category_id']]['name']} {r['score']:.2f}" for r in results]
    assert sorted(text.replace("<b>", "&lt;b&gt;") for text in texts) == expected_labels(models[0], path, 0, [chosen])
    with Image.open(contents["a.1.png"]) as drawn:
        assert drawn.size == (512, 366)


def test_uploads_that_cannot_be_used(models: list[ServedModel], visit: "Callable[[], Page]", tmp_path: Path) -> None:
    """A message names what is wrong, what was shown goes, and the next image is seen."""
    page = visit()
    path = picture(tmp_path / "a.png")
    page.locator("#model-0").get_by_role("button", name="make files").click()
    page.get_by_text("There is no image yet").wait_for()
    give(page, path)
    wait_for_labels(page, 0, expected_labels(models[0], path, 0.5, []))
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.click()
    page.locator("#model-0 svg[role=img]").wait_for(state="detached")
    (tmp_path / "broken.jpg").write_text("<html>")
    give(page, tmp_path / "broken.jpg")
    page.get_by_text("broken.jpg cannot be read: the file cannot be decoded (it is a web page").wait_for()
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.click()
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    give(page, tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size of 1.0 Mb").first.wait_for()
    upload = {"files": {"name": "a.png", "mimeType": "image/png", "buffer": bytes(2**20 + 1)}}  # past the page
    assert page.request.post("/gradio_api/upload", multipart=upload).status == 413
    page.reload()
    page.wait_for_selector("input[type=file]", state="attached")
    give(page, path)
    wait_for_labels(page, 1, expected_labels(models[1], path, 0.5, []))


def test_two_visitors_at_once(models: list[ServedModel], visit: "Callable[[], Page]", tmp_path: Path) -> None:
    """Each has an own image, score and files."""
    paths = [picture(tmp_path / f"{seed}.png", seed=seed) for seed in range(2)]
    pages = [visit(), visit()]
    for page, path in zip(pages, paths):
        give(page, path)
    pages[1].get_by_label("number input for least score").fill("0")
    for number, model in enumerate(models):
        for page, path, score in zip(pages, paths, (0.5, 0)):
            wait_for_labels(page, number, expected_labels(model, path, score, []))
    for page in pages:
        page.locator("#model-0").get_by_role("button", name="make files").click()
    for page, path in zip(pages, paths):
        page.locator(f"#model-0 a[download='{path.stem}.1.png']").wait_for()


def test_only_this_machine_reaches_it(port: int) -> None:
    """Another address of the machine, such as others use, is refused."""
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
