"""Levels that a detector does without and masks need, from finer maps of the backbone (Lin et al. 2017)."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn

from querymask.common.layers import LevelProjections
from querymask.common.predictions import Predictions
from querymask.common.pyramid import FeaturePyramid


class FinerLevels(nn.Module):
    """Adds levels below a detector's pyramid, each of the backbone's map and the level above.

    Args:
        shapes: of the backbone's maps.
        strides: of the detector's pyramid.
        stride: of the finest level that is wanted.
        width: C.

    Raises:
        ValueError: the backbone has no map for a level.
    """

    def __init__(self, shapes: Mapping[str, ShapeSpec], strides: Sequence[int], stride: int, width: int) -> None:
        super().__init__()
        self.strides = list(strides)
        self.in_features: list[str] = []
        self.laterals, self.outputs = nn.ModuleList(), nn.ModuleList()
        while self.strides[0] > stride:
            wanted = self.strides[0] // 2
            names = [name for name, shape in shapes.items() if shape.stride == wanted]
            if not names:
                given = {name: shape.stride for name, shape in shapes.items()}
                raise ValueError(
                    f"the masks need a map of stride {wanted}, but the detector's pyramid begins with {strides[0]} and "
                    f"the backbone gives {given}: have it give one more by its OUT_FEATURES (res2, stage0)"
                )
            self.in_features.append(names[0])
            self.laterals.append(LevelProjections([shapes[names[0]].channels], width, 1))
            self.outputs.append(nn.Conv2d(width, width, 3, padding=1))
            self.strides.insert(0, wanted)
        for conv in self.outputs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, found: Predictions) -> FeaturePyramid:
        """The detector's pyramid with the finer levels before it."""
        assert found.pyramid is not None
        if not self.in_features:
            return found.pyramid
        maps = list(found.pyramid.maps)
        for name, lateral, output in zip(self.in_features, self.laterals, self.outputs, strict=True):
            (level,) = lateral([found.features[name]])
            above = F.interpolate(maps[0], size=level.shape[-2:], mode="nearest")
            maps.insert(0, output(level + above.to(level.dtype)))
        return FeaturePyramid(maps, self.strides)
