"""Checkpoints in the formats of others: safe reading, renaming by rules, a report key by key, recognition."""

from querymask.common.checkpoint.files import MODEL_KEYS, read_checkpoint, read_content, write_checkpoint
from querymask.common.checkpoint.formats import (
    FORMATS,
    Format,
    Options,
    coco_class_ids,
    pick_classes,
    recognise,
    register_format,
)
from querymask.common.checkpoint.rules import (
    Change,
    CheckpointError,
    Copy,
    Drop,
    Line,
    Rename,
    Report,
    Rule,
    State,
    apply_rules,
    fit_to_model,
)

__all__ = [
    "FORMATS",
    "MODEL_KEYS",
    "Change",
    "CheckpointError",
    "Copy",
    "Drop",
    "Format",
    "Line",
    "Options",
    "Rename",
    "Report",
    "Rule",
    "State",
    "apply_rules",
    "coco_class_ids",
    "fit_to_model",
    "pick_classes",
    "read_checkpoint",
    "read_content",
    "recognise",
    "register_format",
    "write_checkpoint",
]
