"""ISTR's mask codings and crops against the official implementation."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close, fixture, load_arrays, load_cases, load_document
from istr_model import double_precision, official_value, unpack

from querymask.common.data.segmentation import crop_polygons
from querymask.common.mask_coding import AutoencoderMaskCoding, DCTMaskCoding, PCAMaskCoding
from querymask.common.mask_coding.incremental_pca import fit
from querymask.common.mask_coding.pca import label_logits
from querymask.common.masks import crop_masks
from querymask.istr.checkpoint import convert


def component_cases(*arrays: str) -> list[str]:
    """Names of the component cases with all these arrays."""
    found = load_cases("istr", "component").items()
    return [name for name, case in found if all(array in case["arrays"] for array in arrays)]


def fixture_crops(inputs: dict[str, Any], size: int) -> torch.Tensor:
    _, masks, boxes = fixture().targets(
        inputs["target_seed"], inputs["height"], inputs["width"], inputs["count"], inputs["num_classes"]
    )
    return crop_masks(torch.from_numpy(masks), torch.from_numpy(boxes), size)


def pca_coding(length: int, size: int) -> PCAMaskCoding:
    """The coding with the constants of the cases, at u = 0.5."""
    with double_precision():
        coding = PCAMaskCoding(size, length, noise=None).double()
    state = {
        f"mask_encoding.{name}": official_value(f"mask_encoding.{name}", value.shape)
        for name, value in coding.state_dict().items()
    }
    coding.load_state_dict(
        {key.removeprefix("mask_branch.coding."): value for key, value in convert(state, None)[0].items()}
    )
    return coding


@pytest.mark.parametrize("name", component_cases("embedding_half"))
def test_istr_pca(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    size = case["configuration"]["mask_size"]
    coding = pca_coding(case["configuration"]["embedding_dim"], size)
    crops = fixture_crops(case["inputs"], size)
    assert np.array_equal(crops, expected["crops"])
    half = coding.encode(crops)
    assert_close(half, expected["embedding_half"], "embedding_half")
    variates = torch.from_numpy(expected["uniform"])
    assert_close(coding.encode(crops, variates), expected["embedding_uniform"], "embedding_uniform")
    coding.noise = lambda pixels: variates
    assert_close(coding.encode(crops), expected["embedding_uniform"], "embedding_uniform by the hook")
    assert_close(coding.decode_logits(half).flatten(1), expected["decoded_logit"], "decoded_logit")
    assert_close(coding.decode(half).flatten(1), expected["decoded"], "decoded")
    given = torch.from_numpy(fixture().weight("case.embedding", expected["given"].shape))
    assert_close(given, expected["given"], "given")
    assert_close(coding.decode(given).flatten(1), expected["decoded_given"], "decoded_given")


@pytest.mark.parametrize("name", component_cases("polygons", "other_boxes"))
def test_istr_crops(name: str) -> None:
    case = load_cases("istr")[name]
    inputs, expected = case["inputs"], load_arrays("istr", case)
    count = inputs["count"]
    _, masks, boxes = fixture().targets(
        inputs["target_seed"], inputs["height"], inputs["width"], count, inputs["num_classes"]
    )
    assert_close(boxes, expected["boxes"], "boxes")
    compared = 0
    for key in expected:
        kind, _, rest = key.partition("_")
        which, _, size = rest.rpartition("_")
        if not size.isdigit():
            continue
        truth = unpack(expected[key], (count, int(size), int(size)))
        if kind == "polygon":
            pairs = zip(expected["polygons"], expected[which], strict=True)
            crops = np.stack([crop_polygons([polygon.ravel()], box, int(size)) for polygon, box in pairs])
        else:
            assert kind == "bitmap", key
            crops = crop_masks(torch.from_numpy(masks), torch.from_numpy(expected[which]), int(size)).numpy()
        assert np.array_equal(crops, truth), key
        compared += 1
    assert compared


@pytest.mark.parametrize("name", component_cases("explained_variance_ratio") + component_cases("see"))
def test_istr_fitted_basis(name: str) -> None:
    case = load_cases("istr")[name]
    inputs, expected = case["inputs"], load_arrays("istr", case)
    assert load_document("istr")["mask_pca"].startswith("mask_pca cases: mask i = fixture.targets(first_seed + i")
    first, count, side = inputs["first_seed"], inputs["count"], inputs["size"]
    pixels = expected["components"].shape[1]
    size = round(pixels**0.5)
    crops = []
    for seed in range(first, first + count):
        _, mask, box = fixture().targets(seed, side, side, 1, 1)
        crops.append(crop_masks(torch.from_numpy(mask), torch.from_numpy(box), size))
    crops = torch.cat(crops)
    assert np.array_equal(crops, unpack(expected["crops"], (count, size, size)))
    variates = np.random.default_rng(first).random((count, pixels))
    logits = label_logits(crops.flatten(1).double(), torch.from_numpy(variates)).numpy()
    assert_close(logits[0], expected["logits_of_first"], "logits_of_first")
    basis = fit(logits, inputs["components"], inputs["batch_size"])
    for key, value in {
        "components": basis.components,
        "mean": basis.mean,
        "explained_variance": basis.explained_variance,
        "explained_variance_ratio": basis.explained_variance_ratio,
    }.items():
        assert_close(value, expected[key], key)
    with double_precision():
        coding = PCAMaskCoding(size, inputs["components"], basis, noise=None)
    vectors = coding.encode(crops, torch.from_numpy(variates))
    assert_close(vectors[: len(expected["embeddings"])], expected["embeddings"], "embeddings")
    decoded = coding.decode(vectors) >= 0.5
    assert_close((decoded & crops).sum() / (decoded | crops).sum(), expected["iou"], "iou")


@pytest.mark.parametrize("name", component_cases("dct_embedding", "ae_embedding"))
def test_istr_v2_codings(name: str) -> None:
    case = load_cases("istr")[name]
    expected = load_arrays("istr", case)
    size, length = case["configuration"]["mask_size"], case["configuration"]["embedding_dim"]
    crops = fixture_crops(case["inputs"], size)
    assert np.array_equal(crops, unpack(expected["crops"], (len(crops), size, size)))
    with double_precision():
        dct = DCTMaskCoding(size, length)
        autoencoder = AutoencoderMaskCoding(size, length).eval()
    cells = torch.stack((dct.cells // dct.extent, dct.cells % dct.extent), dim=1)
    assert np.array_equal(cells, expected["dct_coords"])
    vectors = dct.encode(crops)
    assert_close(vectors, expected["dct_embedding"], "dct_embedding")
    assert_close(dct.decode(vectors)[:, ::2, ::2], expected["dct_decoded"], "dct_decoded")

    names = {}  # the official names of this project's tensors
    for key in autoencoder.state_dict():
        part, index, *rest = key.split(".")
        inside = [index, "up", *rest] if part == "decoder" and len(rest) == 2 else [index, *rest]
        names[key] = ".".join([f"mask_{part[0].upper()}", part, *inside])
    state = {names[key]: official_value(names[key], value.shape) for key, value in autoencoder.state_dict().items()}
    converted, _ = convert(state, None)
    autoencoder.load_state_dict({key.removeprefix("mask_branch.coding."): value for key, value in converted.items()})
    with torch.no_grad():
        vectors = autoencoder.encode(crops)
        context = 50 * torch.from_numpy(fixture().weight("case.roi", (len(crops), 32, size // 4, size // 4)))
        arrays = {
            "ae_embedding": vectors,
            "ae_decoded": autoencoder.decode(vectors)[:, ::2, ::2],
            "ae_decoded_roi": autoencoder.decode(vectors, context)[:, ::2, ::2],
            "ae_embedding_batch_statistics": autoencoder.train().encode(crops),
        }
    for key, array in arrays.items():
        assert_close(array, expected[key], key)
