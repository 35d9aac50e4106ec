"""``MODEL.SIZE_DIVISIBILITY`` pads an image as a larger one beside it in the batch would."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny_configs import tiny_config
from tiny_models import spread_weights

SIZE, PADDED = (100, 150), (128, 192)


@pytest.mark.parametrize("name", ["solq/solq_r50", "effseg/effseg_r50", "isda/isda_r50"])
def test_padding(name: str) -> None:
    torch.manual_seed(0)
    cfg = tiny_config(name)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval().double()
    spread_weights(model.parameters())
    cfg.MODEL.SIZE_DIVISIBILITY = 64
    padding = build_model(cfg).eval().double()
    padding.load_state_dict(model.state_dict())
    image, larger = ({"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)} for size in (SIZE, PADDED))
    assert padding.preprocess([image]).tensor.shape[-2:] == PADDED
    with torch.no_grad():
        (found,), (expected, _) = (m(batch) for m, batch in ((padding, [image]), (model, [image, larger])))
    found, expected = found["instances"], expected["instances"]
    assert found.image_size == expected.image_size == SIZE and len(found) == len(expected) > 0
    for field, value in expected.get_fields().items():
        tensors = [getattr(x, "tensor", x) for x in (found.get(field), value)]
        torch.testing.assert_close(*tensors)


def test_common_multiple() -> None:
    """Of what the backbone's pyramid needs, too."""
    cfg = tiny_config("istr/istr_r50")
    needed = build_model(cfg).size_divisibility
    cfg.MODEL.SIZE_DIVISIBILITY = 48
    assert build_model(cfg).size_divisibility == needed * 3 == 96
    cfg.MODEL.SIZE_DIVISIBILITY = -1
    with pytest.raises(ValueError, match=r"MODEL\.SIZE_DIVISIBILITY is -1: set 0"):
        build_model(cfg)
