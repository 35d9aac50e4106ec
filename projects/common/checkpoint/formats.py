"""Which model a file holds. Methods register the formats that they convert; backbones and the models that are only
recognised, so that a refusal can name them, are listed here.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.data import MetadataCatalog

from querymask.common.checkpoint.rules import Change, CheckpointError, Drop, Rename, Report, Rule, State, apply_rules


@dataclass(frozen=True)
class Options:
    """What a user can ask of a conversion.

    Attributes:
        class_ids: rows of the class head to keep, in the order of the model's classes; None keeps all rows.
        drop_classes: leave the class head out, for training on another data set.
        detector_only: leave the mask branch out.
        model_keys: keys of the model's state dict, for formats whose prefix depends on the model.
    """

    class_ids: Sequence[int] | None = None
    drop_classes: bool = False
    detector_only: bool = False
    model_keys: Collection[str] = ()


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: of the model, for messages.
        signature: patterns of which each must be found in some key.
        excluded: patterns of which none may be found.
        meta_architecture: the only model that it converts for, for formats that others start from in another way.
        describe: the name with what the shapes tell.
        settings: the config keys that a file demands, with their values.
        convert: the conversion; None where the format is only recognised.
        new_keys: pattern of the model's keys that a file need not have.
        advice: what to do with a file that is only recognised.
    """

    name: str
    signature: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    meta_architecture: str | None = None
    describe: Callable[[State], str] | None = None
    settings: Callable[[State, Options], dict[str, Any]] | None = None
    convert: Callable[[State, Options], tuple[State, Report]] | None = None
    new_keys: Callable[[Options], str | None] = lambda options: None
    advice: str = "QueryMask does not convert this format."

    def matches(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys has this format."""

        def found(pattern: str) -> bool:
            return any(re.search(pattern, key) for key in keys)

        return all(found(pattern) for pattern in self.signature) and not any(found(p) for p in self.excluded)

    def description(self, state: State) -> str:
        """What the file holds, in a few words."""
        return self.describe(state) if self.describe else self.name


FORMATS: list[Format] = []


def register_format(format: Format) -> Format:
    """Make a format known to ``recognise``. Formats exclude each other, so their order does not matter."""
    FORMATS.append(format)
    return format


def recognise(state: State, meta_architecture: str | None = None) -> Format | None:
    """The format of a file with these tensors, or None.

    Args:
        meta_architecture: of the model to convert for; formats made for it come before the general ones.
    """
    matching = [format for format in FORMATS if format.matches(state)]
    for wanted in (meta_architecture, None):
        for format in matching:
            if format.meta_architecture == wanted:
                return format
    return None


def coco_class_ids() -> list[int]:
    """COCO's 80 raw category ids in the order of Detectron2's contiguous classes."""
    contiguous = MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id
    return sorted(contiguous, key=contiguous.__getitem__)


def pick_classes(pattern: str, rows: int, class_ids: Sequence[int]) -> Change:
    """The rule that keeps the rows ``class_ids`` of the class heads that ``pattern`` matches.

    Raises:
        CheckpointError: a head of ``rows`` rows has not all of them.
    """
    if not class_ids or min(class_ids) < 0 or max(class_ids) >= rows:
        raise CheckpointError(
            f"Rows up to {max(class_ids, default=None)} of the class head are asked for, the file's has {rows}: it was "
            "not trained with raw COCO category ids. Use --keep-classes if its rows are the model's classes already, "
            "or --drop-classes to train them anew."
        )
    index = torch.as_tensor(list(class_ids))
    return Change(pattern, lambda value: value[index], f"{len(class_ids)} of {rows} rows")


def drop_class_head(pattern: str) -> Drop:
    """The rule for ``Options.drop_classes``; ``pattern`` is of the keys that depend on the classes."""
    return Drop(pattern, "class head, not asked for")


def drop_mask_branch(pattern: str) -> Drop:
    """The rule for ``Options.detector_only``."""
    return Drop(pattern, "mask branch, not asked for")


def without_masks(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a file's settings that remain with ``Options.detector_only``."""
    detector = {
        key: x for key, x in settings.items() if not key.startswith(("MODEL.MASK_BRANCH.", "MODEL.MASK_CODING."))
    }
    return {**detector, "MODEL.MASK_BRANCH.NAME": "none"}


def new_if_dropped(class_head: str) -> Callable[[Options], str | None]:
    """``new_keys`` of a format: the class head, if it is left out."""
    return lambda options: class_head if options.drop_classes else None


def own_format(
    name: str,
    signature: tuple[str, ...],
    class_head: str,
    mask_branch: str | None = None,
    moved: Sequence[tuple[str, str]] = (),
) -> Format:
    """The format of a model of this project.

    Args:
        class_head, mask_branch: patterns of their keys today; None where no part makes masks alone.
        moved: patterns of older names, and what today has in their place; other names are kept.
    """

    def convert(state: State, options: Options) -> tuple[State, Report]:
        rules: list[Rule] = [Rename(*names) for names in moved]
        if options.drop_classes:
            rules.append(drop_class_head(class_head))
        if options.detector_only and mask_branch is not None:
            rules.append(drop_mask_branch(mask_branch))
        return apply_rules(state, rules)

    return Format(f"{name} in QueryMask's own names", signature, convert=convert, new_keys=new_if_dropped(class_head))


# ---- Backbones ----------------------------------------------------------------------------------------------------

# Blocks of the third stage -> depth, for bottleneck (with conv3) and for basic blocks
_BOTTLENECK_DEPTHS = {6: 50, 23: 101, 36: 152}
_BASIC_DEPTHS = {2: 18, 6: 34}


def resnet_rules(source: str, target: str) -> list[Rule]:
    r"""Rules from torchvision's ResNet names to Detectron2's.

    Args:
        source: pattern of the prefix in the file, for example ``r"^backbone\.0\.body\."``.
        target: the prefix in the model, for example ``"backbone."``.
    """
    prefix = "^" + re.escape(target)
    return [
        Rename(source + r"(?=(conv1|bn1|layer\d+)\.)", target),
        Rename(prefix + r"conv1\.", f"{target}stem.conv1."),
        Rename(prefix + r"bn1\.", f"{target}stem.conv1.norm."),
        Rename(prefix + r"layer(\d)\.", lambda match: f"{target}res{int(match[1]) + 1}."),
        Rename(f"({prefix}" + r"res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
        Rename(f"({prefix}" + r"res\d\.\d+)\.downsample\.0\.", r"\1.shortcut."),
        Rename(f"({prefix}" + r"res\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
        Drop(prefix + r".*\.num_batches_tracked$", "counter of a batch norm, not used by a frozen one"),
    ]


def resnet_settings(state: State, prefix: str) -> dict[str, Any]:
    """Config keys of a Detectron2 ResNet for a file with torchvision's names behind ``prefix``."""
    blocks = {int(m[1]) for key in state if (m := re.match(re.escape(prefix) + r"layer3\.(\d+)\.", key))}
    bottleneck = f"{prefix}layer3.0.conv3.weight" in state
    return {
        "MODEL.RESNETS.DEPTH": (_BOTTLENECK_DEPTHS if bottleneck else _BASIC_DEPTHS).get(len(blocks)),
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }


def swin_rules(target: str) -> list[Rule]:
    """Rules for Swin's own names behind the model's prefix ``target``: buffers that the model computes are left out."""
    prefix = "^" + re.escape(target)
    return [
        Drop(prefix + r".*\.relative_position_index$", "computed by the model"),
        Drop(prefix + r".*\.attn_mask$", "computed by the model"),
    ]


def swin_settings(state: State, prefix: str) -> dict[str, Any]:
    """Config keys of the Swin backbone for a file with Swin's names behind ``prefix``."""

    def blocks(stage: int) -> int:
        pattern = re.escape(prefix) + rf"layers\.{stage}\.blocks\.(\d+)\."
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    table = f"{prefix}layers.{{}}.blocks.0.attn.relative_position_bias_table"
    return {
        "MODEL.SWIN.EMBED_DIM": state[f"{prefix}patch_embed.proj.weight"].shape[0],
        "MODEL.SWIN.DEPTHS": [blocks(stage) for stage in range(4)],
        "MODEL.SWIN.NUM_HEADS": [state[table.format(stage)].shape[1] for stage in range(4)],
        "MODEL.SWIN.WINDOW_SIZE": (int(state[table.format(0)].shape[0] ** 0.5) + 1) // 2,
    }


def _backbone_prefix(keys: Collection[str], marker: str, what: str) -> str:
    """The prefix of the backbone in the model, found by the name of its first convolution."""
    prefixes = [key[: -len(marker)] for key in keys if key.endswith(marker)]
    if len(prefixes) != 1:
        raise CheckpointError(f"The file holds a {what}, but the config's model has no such backbone.")
    return prefixes[0]


def _convert_torchvision_resnet(state: State, options: Options) -> tuple[State, Report]:
    prefix = _backbone_prefix(options.model_keys, "stem.conv1.weight", "ResNet")
    return apply_rules(state, [Drop(r"^fc\.", "ImageNet classifier"), *resnet_rules("^", prefix)])


def _convert_detectron2_resnet(state: State, options: Options) -> tuple[State, Report]:
    prefix = _backbone_prefix(options.model_keys, "stem.conv1.weight", "ResNet")
    classifier = Drop(r"^(stem\.fc|fc|linear)\.", "ImageNet classifier")
    return apply_rules(state, [classifier, Rename("^", prefix)])


def _convert_swin(state: State, options: Options) -> tuple[State, Report]:
    prefix = _backbone_prefix(options.model_keys, "patch_embed.proj.weight", "Swin transformer")
    rules: list[Rule] = [
        Drop(r"^head\.", "ImageNet classifier"),
        Drop(r"^norm\.", "norm before the ImageNet classifier; a detector has one a stage"),
    ]
    if "layers.0.downsample.norm.weight" not in state:  # timm counts the merging of patches to the stage after it
        rules.append(Rename(r"^layers\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."))
    return apply_rules(state, [*rules, Rename("^", prefix), *swin_rules(prefix)])


def _all_but_resnet(options: Options) -> str:
    prefix = _backbone_prefix(options.model_keys, "stem.conv1.weight", "ResNet")
    return f"^(?!{re.escape(prefix)})"


def _all_but_swin(options: Options) -> str:
    """The norms of the outputs do not exist in a classifier either."""
    prefix = re.escape(_backbone_prefix(options.model_keys, "patch_embed.proj.weight", "Swin transformer"))
    return rf"^(?!{prefix})|^{prefix}norm\d\."


register_format(
    Format(
        "torchvision ResNet",
        (r"^conv1\.weight$", r"^layer1\.0\.conv1\.weight$"),
        describe=lambda state: f"torchvision ResNet-{resnet_settings(state, '')['MODEL.RESNETS.DEPTH']}",
        settings=lambda state, options: resnet_settings(state, ""),
        convert=_convert_torchvision_resnet,
        new_keys=_all_but_resnet,
    )
)
register_format(
    Format(
        "Detectron2 ResNet backbone",
        (r"^stem\.conv1\.weight$", r"^res2\.0\.conv1\.weight$"),
        convert=_convert_detectron2_resnet,
        new_keys=_all_but_resnet,
    )
)
register_format(
    Format(
        "Swin transformer",
        (r"^patch_embed\.proj\.weight$", r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$"),
        excluded=(r"\.attn\.logit_scale$",),
        describe=lambda state: f"Swin transformer of width {swin_settings(state, '')['MODEL.SWIN.EMBED_DIM']}",
        settings=lambda state, options: swin_settings(state, ""),
        convert=_convert_swin,
        new_keys=_all_but_swin,
    )
)

# ---- Models that are only recognised ------------------------------------------------------------------------------

for _format in (
    Format("Detectron ResNet (Caffe2 names)", (r"^res2_0_branch2a_w$",), advice="MODEL.WEIGHTS reads it as it is."),
    Format("Detectron2 R-CNN", (r"^roi_heads\.", r"^backbone\.bottom_up\.")),
    Format("torchvision detector", (r"^backbone\.body\.layer1\.", r"^(rpn|head)\.")),
    Format("Mask2Former or MaskFormer", (r"^sem_seg_head\.(pixel_decoder|predictor)\.",)),
    Format("DETR", (r"^transformer\.encoder\.layers\.0\.self_attn\.in_proj_weight$", r"^query_embed\.weight$")),
    Format("DN-DETR or DINO", (r"^transformer\.level_embed$", r"label_enc\.weight$")),
    Format(
        "Deformable DETR of Hugging Face transformers", (r"^model\.encoder\.layers\.0\.self_attn\.sampling_offsets\.",)
    ),
    Format(
        "Deformable DETR of mmdetection",
        (r"(^bbox_head\.transformer|^)\.?decoder\.layers\.0\..*sampling_offsets\.", r"^bbox_head\.reg_branches\."),
        excluded=(r"^bbox_head\.kernel_branches\.", r"dn_query_generator|denoising"),
    ),
    Format("Sparse R-CNN", (r"^head\.head_series\.0\.inst_interact\.", r"^init_proposal_features\.")),
    Format(
        "EffSeg or FQDet (DetSeg) of another form",
        (r"^heads\.gvd\.",),
        excluded=(r"^core\.body\.lateral_convs\.",),
        advice="QueryMask converts those on a ResNet with a feature pyramid.",
    ),
    Format("vision transformer of timm", (r"^patch_embed\.proj\.weight$", r"^blocks\.0\.attn\.qkv\.weight$")),
    Format("Swin transformer V2", (r"^patch_embed\.proj\.weight$", r"^layers\.0\.blocks\.0\.attn\.logit_scale$")),
):
    register_format(_format)
