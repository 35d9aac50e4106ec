"""Any convolutional or hierarchical model of the package timm as a backbone."""

import difflib
import importlib
import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from querymask.common.checkpoint import CheckpointError, State
from querymask.common.packages import import_package

logger = logging.getLogger(__name__)

NAMES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
"""Name of the map of every stride, as Detectron2's ResNets have them: the methods' configs read these."""


def import_timm() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    return import_package("timm", "backbones of timm need", "querymask[timm]")


class TimmBackbone(Backbone):
    """The maps of stride 4 to 32 of one of timm's models.

    Args:
        name: timm's, such as "efficientnet_lite0".
        freeze_at: n freezes all that the map of stride 2^n is made of, as Detectron2 does with ResNets: 0 nothing, 2
            up to the map of stride 4. Frozen parts drop no paths and keep the statistics of their norms.
        freeze_norms: batch norms keep their statistics, scales and shifts.
        in_channels: of the images.

    Raises:
        ValueError: timm does not know the model, or it has no maps of these strides.
    """

    def __init__(self, name: str, freeze_at: int = 0, freeze_norms: bool = False, in_channels: int = 3) -> None:
        super().__init__()
        timm = import_timm()
        if not timm.is_model(name):
            near = ", ".join(difflib.get_close_matches(name, timm.list_models())) or "none"
            raise ValueError(f"MODEL.TIMM.NAME is {name!r}: timm {timm.__version__} has no such model; near: {near}")
        try:
            self.body = timm.create_model(name, features_only=True, in_chans=in_channels)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"MODEL.TIMM.NAME is {name}, which gives no maps (timm's features_only): {error}"
            ) from error
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.strides = list(self.body.feature_info.reduction())
        if len(set(self.strides)) < len(self.strides) or not set(self.strides) & set(NAMES):
            raise ValueError(
                f"MODEL.TIMM.NAME is {name}, whose maps have the strides {self.strides}: a backbone needs one map for "
                f"each of some of the strides {list(NAMES)}"
            )
        if freeze_norms:
            self.body = importlib.import_module("timm.layers").freeze_batch_norm_2d(self.body)
        channels = dict(zip(self.strides, self.body.feature_info.channels(), strict=True))
        self._out_features = [NAMES[stride] for stride in self.strides if stride in NAMES]
        self._out_feature_channels = {NAMES[s]: count for s, count in channels.items() if s in NAMES}
        self._out_feature_strides = {NAMES[s]: s for s in self.strides if s in NAMES}
        self._frozen: list[nn.Module] = []
        if freeze_at:
            self._freeze(freeze_at, in_channels)

    def _freeze(self, freeze_at: int, in_channels: int) -> None:
        if 2**freeze_at not in self.strides:
            known = ", ".join(str(stride.bit_length() - 1) for stride in self.strides)
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; for this model it is 0 (nothing) or {known}")
        parameters = list(self.body.parameters())
        training = self.body.training
        maps = self.body.eval()(torch.zeros(1, in_channels, 64, 64))  # what a map is made of has a gradient
        self.body.train(training)
        used = torch.autograd.grad(maps[self.strides.index(2**freeze_at)].sum(), parameters, allow_unused=True)
        frozen = {id(p) for p, gradient in zip(parameters, used, strict=True) if gradient is not None}
        for parameter in parameters:
            parameter.requires_grad_(parameter.requires_grad and id(parameter) not in frozen)
        for module in self.body.modules():
            own = list(module.parameters())
            if own and all(id(parameter) in frozen for parameter in own):
                self._frozen.append(module.eval())

    def train(self, mode: bool = True) -> "TimmBackbone":
        """As usual, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, in_channels, height, width) -> maps (B, C, h, w) by name."""
        outputs = {}
        for stride, features in zip(self.strides, self.body(images), strict=True):
            if stride in NAMES:
                outputs[NAMES[stride]] = features.permute(0, 3, 1, 2) if self.channels_last else features
        return outputs


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The model of ``MODEL.TIMM``; a warning where its published weights are for other means of pixels."""
    keys = cfg.MODEL.TIMM
    backbone = TimmBackbone(keys.NAME, cfg.MODEL.BACKBONE.FREEZE_AT, keys.FREEZE_NORMS, input_shape.channels)
    published = import_timm().get_pretrained_cfg(keys.NAME)
    for key, values in (("MODEL.PIXEL_MEAN", published.mean), ("MODEL.PIXEL_STD", published.std)):
        wanted = [round(255 * value, 3) for value in values]
        own = list(cfg.MODEL[key.partition(".")[2]])
        if max(abs(a - b) for a, b in zip(wanted, own)) > 1:
            logger.warning(f"weights of timm's {keys.NAME} are for {key} {wanted}, the config has {own}")
    return backbone


def _renamed_by_order(state: State, own: State) -> State:
    """The tensors under a model's own names, where a port has others but the same tensors in the same order."""
    kinds = [[(key.rpartition(".")[2], tuple(value.shape)) for key, value in x.items()] for x in (state, own)]
    if state.keys() & own.keys() or kinds[0] != kinds[1]:
        return state
    logger.info("the file has other names than timm; its tensors are those of timm one by one, in kind and shape")
    return dict(zip(own, state.values()))


def convert_timm(cfg: CfgNode, state: State | None) -> State:
    """Weights of a classification model of timm, in timm's names, for the backbone of a config.

    Args:
        state: of a file; None: those that timm fetches for ``MODEL.TIMM.NAME``.

    Raises:
        CheckpointError: they are of another model, or there is no network.
    """
    timm, name = import_timm(), cfg.MODEL.TIMM.NAME
    if state is None:
        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # its hub raises whatever its libraries raise
            raise CheckpointError(f"timm has no weights for {name}, or cannot fetch them: {error}") from error
    with torch.device("meta"):
        whole = timm.create_model(name)
    head = whole.default_cfg.get("classifier") or ()
    heads = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
    shapes = {key: value.shape for key, value in whole.state_dict().items() if not key.startswith(heads)}
    state = _renamed_by_order(state, whole.state_dict())
    missing = [key for key, shape in shapes.items() if key not in state or state[key].shape != shape]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(shapes)} tensors of timm's {name} are not in the file, or of another shape, "
            f"such as {missing[0]}: is it of another model?"
        )
    body = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    prefix = "backbone.bottom_up.body." if "_fpn_" in cfg.MODEL.BACKBONE.NAME else "backbone.body."
    return {prefix + key: value for key, value in body.state_dict().items()}
