"""Learning mask codings from a data set: result, resuming, what the files hold."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from devices import DEVICE
from tool_loader import load_tool

from querymask.common.data.mask_crops import MaskCrops
from querymask.common.mask_coding import (
    PCABasis,
    PCAMaskCoding,
    SparseBasis,
    SparseMaskCoding,
    build_mask_coding,
    fitting,
    label_logits,
)
from querymask.common.mask_coding.incremental_pca import IncrementalPCA, batch_slices, fit

NAME = "masks_of_a_test"


def make_dicts(number: int = 40) -> list[dict[str, Any]]:
    """Images with two quadrangles each, the second as RLE, and a crowd."""
    rng = np.random.default_rng(0)
    dicts = []
    for index in range(number):
        annotations = []
        for form in ("polygon", "rle", "crowd"):
            x, y = rng.uniform(0, 30, 2)
            w, h = rng.uniform(8, 30, 2)
            cut = rng.uniform(0.2, 0.8, 4)
            corners = [x + cut[0] * w, y, x + w, y + cut[1] * h, x + cut[2] * w, y + h, x, y + cut[3] * h]
            segmentation: Any = [corners]
            if form != "polygon":
                segmentation = pycocotools.mask.merge(pycocotools.mask.frPyObjects([corners], 60, 60))
            annotations.append(
                {
                    "bbox": [x, y, w, h],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "segmentation": segmentation,
                    "iscrowd": int(form == "crowd"),
                }
            )
        dicts.append({"file_name": f"{index}.jpg", "height": 60, "width": 60, "annotations": annotations})
    return dicts


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    DatasetCatalog.register(NAME, make_dicts)
    yield
    DatasetCatalog.remove(NAME)


def test_crops() -> None:
    crops = MaskCrops([NAME], 16)
    assert len(crops) == 80 and len(MaskCrops([NAME], 16, limit=7)) == 7
    for index in range(6):  # polygons at even places, RLE at odd ones
        mask = crops[index]
        assert mask.shape == (16, 16) and mask.dtype == torch.bool and 0.3 < mask.float().mean() < 0.9
        assert mask[:3].any() and mask[:, :3].any() and mask[-3:].any() and mask[:, -3:].any(), "fills its box"
    with pytest.raises(KeyError, match="there is no data set 'nothing'"):
        MaskCrops(["nothing"], 16)


def test_incremental_pca_of_one_batch_is_pca() -> None:
    rows = np.random.default_rng(1).standard_normal((50, 12)) * np.arange(1, 13)
    basis = fit(rows, 12, 50)
    covariance = np.cov(rows, rowvar=False)
    values = np.linalg.eigvalsh(covariance)[::-1]
    assert np.allclose(basis.explained_variance, values)
    assert np.allclose(basis.explained_variance_ratio, values / values.sum())
    assert np.allclose(basis.components @ covariance @ basis.components.T, np.diag(values), atol=1e-8)
    assert (np.take_along_axis(basis.components, np.abs(basis.components).argmax(1)[:, None], 1) > 0).all()
    all_of_them = fit(rows, 12, 13)  # nothing is lost where all components are kept
    assert np.allclose(all_of_them.explained_variance, values) and np.allclose(all_of_them.mean, rows.mean(0))
    assert np.allclose(all_of_them.components, basis.components)


def test_incremental_pca_without_a_mean() -> None:
    """Of "pca_linear": the singular vectors of the rows as they are, in one batch or several."""
    rows = np.random.default_rng(1).standard_normal((50, 12)) * np.arange(1, 13) + 5
    _, values, vectors = np.linalg.svd(rows)
    for batch_size in (50, 13):
        basis = fit(rows, 12, batch_size, "pca_linear")
        assert np.allclose(basis.explained_variance, values**2 / 49) and not basis.mean.any()
        assert np.allclose(basis.explained_variance_ratio, values**2 / (rows**2).sum())
        assert np.allclose(np.abs(np.sum(basis.components * vectors, axis=1)), 1)
        assert basis.coding == "pca_linear"


def test_batches() -> None:
    def lengths(*arguments: int) -> list[int]:
        return [part.stop - part.start for part in batch_slices(*arguments)]

    assert lengths(200, 64, 20) == [64, 64, 72]
    assert lengths(212, 64, 20) == [64, 64, 64, 20]
    assert lengths(10, 64, 20) == [10]
    with pytest.raises(ValueError, match="10 rows do not suffice for 20 components"):
        IncrementalPCA(20).update(np.zeros((10, 30)))


def test_basis_of_a_data_set(tmp_path: Path) -> None:
    tool = load_tool("fit_mask_basis")
    output = tmp_path / "basis.npz"
    arguments = ["--train", NAME, "--test", NAME, "--output", str(output), "--mask-size", "12", "--components", "10"]
    quality = tool.main([*arguments, "--batch-size", "32", "--seed", "5"])
    crops = torch.stack(list(MaskCrops([NAME], 12)))
    variates = torch.from_numpy(np.random.default_rng(5).random((80, 144)))
    expected = fit(label_logits(crops.flatten(1).double(), variates).numpy(), 10, 32)
    basis = PCABasis.load(output)
    for name in ("components", "mean", "explained_variance", "explained_variance_ratio"):
        assert np.allclose(getattr(basis, name), getattr(expected, name), atol=1e-4), name
    with np.load(output) as file:
        assert file["components_c"].shape == (1, 10, 144) and file["mean_c"].dtype == np.float32
        assert '"masks": 80' in str(file["statistics"])
    coding = build_mask_coding("pca", 12, 10, basis=str(output), label_noise=False)
    decoded = coding.decode(coding.encode(crops)) >= 0.5
    iou = ((decoded & crops).sum((1, 2)) / (decoded | crops).sum((1, 2))).mean()
    assert quality["mask_iou"] == pytest.approx(float(iou), abs=1e-6) and iou > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["basis.components.png", "basis.energy.png", "basis.npz"]


@pytest.mark.parametrize("method", ["pca_pixels", "pca_linear"])
def test_basis_of_pixels(tmp_path: Path, method: str) -> None:
    """The singular vectors of the masks' pixels, about their mean or as they are: no other linear code loses less."""
    tool = load_tool("fit_mask_basis")
    output = tmp_path / "basis.npz"
    arguments = ["--method", method, "--train", NAME, "--test", NAME, "--output", str(output), "--mask-size", "12"]
    quality = tool.main([*arguments, "--components", "10", "--batch-size", "100"])
    crops = torch.stack(list(MaskCrops([NAME], 12)))
    pixels = crops.flatten(1).double().numpy()
    mean = pixels.mean(0) if method == "pca_pixels" else np.zeros(144)
    _, values, vectors = np.linalg.svd(pixels - mean)
    basis = PCABasis.load(output)
    assert basis.coding == method and np.allclose(basis.mean, mean)
    assert np.allclose(np.abs(np.sum(basis.components * vectors[:10], axis=1)), 1, atol=1e-5)
    assert np.allclose(basis.explained_variance, values[:10] ** 2 / 79, rtol=1e-5)
    assert basis.explained_variance_ratio.sum() == pytest.approx((values[:10] ** 2).sum() / (values**2).sum(), rel=1e-5)
    coding = build_mask_coding(method, 12, 10, basis=str(output))
    error = (coding.decode(coding.encode(crops)) - crops.double()).square().sum()
    assert error.item() == pytest.approx((values[10:] ** 2).sum(), rel=1e-4)
    decoded = coding.decode(coding.encode(crops)) >= 0.5
    iou = ((decoded & crops).sum((1, 2)) / (decoded | crops).sum((1, 2))).mean()
    assert quality["mask_iou"] == pytest.approx(float(iou), abs=1e-6) and iou > 0.85


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAVE_PERIOD", 1)
    masks, state = MaskCrops([NAME], 12), tmp_path / "state.npz"
    whole = fitting.fit_pca_basis(masks, 6, 16, seed=3)

    update, seen = IncrementalPCA.update, []

    def interrupted(self: IncrementalPCA, rows: np.ndarray) -> None:
        seen.append(len(rows))
        if len(seen) == 3:
            raise KeyboardInterrupt
        update(self, rows)

    monkeypatch.setattr(IncrementalPCA, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitting.fit_pca_basis(masks, 6, 16, seed=3, state=state)
    with pytest.raises(ValueError, match="is of a run with other settings"):
        fitting.fit_pca_basis(masks, 6, 16, seed=4, state=state)
    resumed = fitting.fit_pca_basis(masks, 6, 16, seed=3, state=state)
    assert len(seen) == 3 + 3 and not state.exists()
    for name in ("components", "mean", "explained_variance"):
        assert np.array_equal(getattr(resumed, name), getattr(whole, name)), name


def test_a_basis_that_does_not_fit(tmp_path: Path) -> None:
    fitting.fit_pca_basis(MaskCrops([NAME], 12), 6, 40).save(tmp_path / "basis.npz")
    with pytest.raises(ValueError, match=r"components of shape \(6, 144\), but vectors of 8 for masks of 12x12 need"):
        PCAMaskCoding(12, 8, PCABasis.load(tmp_path / "basis.npz"))


def test_dictionary_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned atoms give masks back better than as many masks of the data set do, and the file is used by a config."""
    pytest.importorskip("sklearn", reason='the extra "sparse" is not installed')
    tool = load_tool("fit_mask_basis")
    output = tmp_path / "dictionary.npz"
    arguments = ["--method", "sparse", "--train", NAME, "--test", NAME, "--output", str(output), "--mask-size", "12"]
    quality = tool.main([*arguments, "--components", "15", "--batch-size", "40", "--penalty", "0.5", "--seed", "5"])
    basis = SparseBasis.load(output)
    assert np.allclose(np.linalg.norm(basis.dictionary, axis=1), 1) and basis.penalty == 0.5
    again = fitting.fit_dictionary(MaskCrops([NAME], 12), 15, 0.5, 40, seed=5)
    assert np.allclose(basis.dictionary, again.dictionary, atol=1e-6)
    crops = torch.stack(list(MaskCrops([NAME], 12)))
    coding = build_mask_coding("sparse", 12, 15, basis=str(output))
    decoded = coding.decode(coding.encode(crops)) >= 0.5
    iou = ((decoded & crops).sum((1, 2)) / (decoded | crops).sum((1, 2))).mean()
    assert quality["mask_iou"] == pytest.approx(float(iou), abs=1e-6) and iou > 0.85
    rows = crops[:15].flatten(1).double()
    samples = SparseMaskCoding(12, 15, SparseBasis((rows / rows.norm(dim=1, keepdim=True)).numpy(), 0.5))
    assert quality["mask_iou"] > fitting.reconstruction_quality(samples, MaskCrops([NAME], 12))["mask_iou"]
    assert "15 atoms, learned with a penalty of 0.5" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dictionary.components.png", "dictionary.npz"]


class Learner:
    """What ``fit_dictionary`` needs of scikit-learn's learner: the last rows of every batch become the atoms."""

    batches: list[int]

    def __init__(self, n_components: int, **options: Any) -> None:
        self.number, self.options = n_components, options
        Learner.batches, Learner.last = [], self

    def partial_fit(self, rows: np.ndarray) -> None:
        assert rows.dtype == np.float64 and set(np.unique(rows)) <= {0.0, 1.0}, "pixels, not logits"
        self.batches.append(len(rows))
        self.components_ = rows[-self.number :] / 2


def with_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("sklearn"), types.ModuleType("sklearn.decomposition")
    module.MiniBatchDictionaryLearning = Learner
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", module)


def test_what_a_dictionary_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask once and in order; rows get the length 1. Does not need scikit-learn."""
    with_learner(monkeypatch)
    masks = MaskCrops([NAME], 12)
    basis = fitting.fit_dictionary(masks, 7, 0.4, 32, seed=3)
    assert Learner.batches == [32, 32, 16]
    options = {key: Learner.last.options[key] for key in ("alpha", "random_state")}
    assert options == {"alpha": 0.4, "random_state": 3}
    rows = torch.stack(list(masks))[-7:].flatten(1).double()
    assert np.allclose(basis.dictionary, rows / rows.norm(dim=1, keepdim=True)) and basis.penalty == 0.4
    with pytest.raises(ValueError, match="batches of 32 masks do not suffice for 40 atoms"):
        fitting.fit_dictionary(masks, 40, batch_size=32)


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"scikit-learn, the package sklearn .*: pip install 'querymask\[sparse\]'"):
        fitting.fit_dictionary(MaskCrops([NAME], 12), 7)
    tool = load_tool("fit_mask_basis")
    with pytest.raises(SystemExit, match="error: learning a dictionary .* needs scikit-learn"):
        tool.main(["--method", "sparse", "--train", NAME, "--output", str(tmp_path / "dictionary.npz")])
    assert not list(tmp_path.iterdir())


def test_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("train_mask_autoencoder")
    output = tmp_path / "smt.pth"
    arguments = ["--train", NAME, "--test", NAME, "--mask-size", "16", "--length", "8", "--batch-size", "16"]
    arguments += ["--epochs", "20", "--device", DEVICE]
    best = tool.main([*arguments, "--output", str(output)])
    coding = build_mask_coding("autoencoder", 16, 8, basis=str(output)).eval()
    quality = fitting.reconstruction_quality(coding, MaskCrops([NAME], 16))
    assert quality["pixel_iou"] == pytest.approx(best) and best > 0.5
    assert not any(p.requires_grad for p in coding.encoder.parameters())
    assert all(p.requires_grad for p in coding.decoder.parameters())

    train_epoch, epochs = fitting._train_epoch, []

    def interrupted(*arguments: Any) -> float:
        epochs.append(arguments)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(fitting, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.main([*arguments, "--output", str(tmp_path / "other.pth")])
    assert tool.main([*arguments, "--output", str(tmp_path / "other.pth")]) == pytest.approx(best, abs=1e-6)
    assert len(epochs) == 3 + 18
