"""Weights from a file into a model, so that nothing is left out or left random without a word."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn

from querymask.common.checkpoint import MODEL_KEYS, CheckpointError, read_content
from querymask.common.engine.averaging import WeightAverage
from querymask.common.engine.checks import get_key, num_classes_key
from querymask.common.engine.class_names import same_names, shown
from querymask.common.measured_models import build_on_meta
from querymask.common.meta_arch import QuerySegmenter

SHOWN = 4
"""Names of tensors in a message."""


class StrictCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but what does not fit is an error or told in one line.

    - A file of which nothing fits the model, and tensors of other shapes, are errors.
    - Files are read as ``querymask.common.checkpoint.read_content`` does: nothing in them is run.
    - Checkpoints keep the names of the classes, ``MODEL.CLASS_NAMES``. Where training starts from weights of other
      classes, all that depends on the number of classes is left out, with a line.

    Args:
        cfg: names the class-count key in messages, and gives the names of the classes.
        complete: the model is to be evaluated: a file that leaves some of its tensors random is an error, too.
        average: of the model's weights, which is written in their place.

    Attributes:
        file: the one that was loaded last.
        class_names: its names of the classes; empty if it has none.
    """

    def __init__(
        self,
        model: Any,
        save_dir: str = "",
        *,
        cfg: CfgNode,
        complete: bool = False,
        average: WeightAverage | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.class_names: list[str] = []
        self._cfg = cfg
        self._complete = complete
        self._average = average
        self.file = ""
        self._entries: set[str] = set()
        self._keys: list[str] = []
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        with nullcontext() if self._average is None else self._average.applied():
            super().save(name, **{"class_names": list(self._cfg.MODEL.CLASS_NAMES), **kwargs})

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file, or nothing if ``path`` is empty.

        Args:
            checkpointables: which of them to load beside the model; None for all, which the file must have then.

        Raises:
            CheckpointError: the file is not there, cannot be read, or does not fit.
        """
        if not path:
            return super().load(path, checkpointables)
        self.file = path
        self._find(path)
        self._entries = set()
        self._resuming = checkpointables is None
        rest = super().load(path, checkpointables)
        missing = [key for key in self.checkpointables if checkpointables is None and key not in self._entries]
        if missing:
            raise CheckpointError(
                f"{path} has weights alone, nothing to resume from: it lacks {', '.join(missing)}. Start from its "
                "weights: without --resume, with MODEL.WEIGHTS"
            )
        self.class_names = [str(name) for name in rest.get("class_names") or ()]
        return rest

    def _find(self, path: str) -> None:
        """Fetch a file by its address, so that a failure is told with the remedy."""
        name = path.partition("?")[0]
        try:
            local = self.path_manager.get_local_path(name)
        except Exception as error:  # handlers raise whatever their libraries raise
            raise CheckpointError(
                f"MODEL.WEIGHTS {path} cannot be fetched ({type(error).__name__}: {error}). Is there a network? Fetch "
                "the file elsewhere and set MODEL.WEIGHTS to its path"
            ) from error
        if not os.path.isfile(local):
            tagged = self.save_dir and os.path.dirname(name) == self.save_dir.rstrip("/")
            remedy = "Check MODEL.WEIGHTS; files of others are made usable by tools/convert_checkpoint.py"
            command = self._cfg.MODEL.WEIGHTS_FROM
            if command.split()[-1:] == [name]:
                remedy = (
                    f"Training starts from it, and it is made once: python {command} (docs/checkpoints.md tells which "
                    "file to convert). To evaluate a model, or to start from another one, name that in MODEL.WEIGHTS"
                )
            if tagged:
                remedy = f"{self.save_dir}/last_checkpoint may name it: write the name of a file that is there"
            raise CheckpointError(f"{path}: there is no such file. {remedy}")

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_content(filename)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{self.file} holds a {type(content).__name__} where a state dict was expected")
        self._entries = {str(key) for key in content}
        content = dict(content)
        place = next((key for key in MODEL_KEYS if isinstance(content.get(key), Mapping)), None)
        by_names = False
        if place is not None:
            content["model"] = content.pop(place)
            by_names = filename.endswith(".pyth")
        elif filename.endswith(".pkl"):  # of Caffe2
            state = content.get("blobs", content)
            state = {key: value for key, value in state.items() if not key.endswith("_momentum")}
            content, by_names = {"model": state, "__author__": "Caffe2"}, True
        else:
            content = {"model": content}
        url = getattr(self, "_parsed_url_during_load", None)  # of newer versions, which take a query
        if by_names or (url is not None and "matching_heuristics=True" in url.query):
            content["matching_heuristics"] = True
        state = content["model"]
        for key in [key for key, value in state.items() if not isinstance(value, (torch.Tensor, np.ndarray))]:
            del state[key]
        if not state:
            shown = ", ".join(sorted(self._entries)[:SHOWN]) or "nothing"
            raise CheckpointError(f"{self.file} has no tensors of a model in it (its entries: {shown})")
        model = getattr(self.model, "module", self.model)
        for prefix in ("", "module.") if isinstance(model, QuerySegmenter) else ():
            model.rename_moved(state, prefix)
        self._keys = [str(key) for key in state]
        return content

    def _load_model(self, checkpoint: Any) -> Any:
        if not (self._complete or self._resuming):
            self._leave_other_classes_out(checkpoint)
        incompatible = super()._load_model(checkpoint)
        if incompatible.incorrect_shapes:
            raise ValueError(self._mismatch(incompatible.incorrect_shapes))
        return incompatible

    def _leave_other_classes_out(self, checkpoint: dict[str, Any]) -> None:
        """Take what depends on the number of classes out of a file of other classes, unless the model has it frozen."""
        key, state, model = num_classes_key(self._cfg), checkpoint["model"], self.model.state_dict()
        names, present = (
            [str(n) for n in x or ()] for x in (checkpoint.get("class_names"), self._cfg.MODEL.CLASS_NAMES)
        )
        places = {name.removeprefix("module."): name for name in state}
        common = [name for name in model if name in places]
        misfits = {name for name in common if tuple(state[places[name]].shape) != tuple(model[name].shape)}
        if key is None or not (misfits or (names and present and not same_names(names, present))):
            return
        heads = [name for name in class_tensors(self._cfg, key, self.model) if name in places]
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        if not heads or misfits.difference(heads) or frozen.intersection(heads):
            return
        for name in heads:
            del state[places[name]]
        self.logger.warning(
            f"{self.file} is of {f'the classes {shown(names)}' if names else 'other classes'}, the model of "
            f"{shown(present) or f'{get_key(self._cfg, key)} others'}: {len(heads)} tensors that depend on the classes "
            f"are left out and learned anew ({_shown(heads)})"
        )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Say how much of the model the file has; refuse a file of which nothing or, in evaluation, not all fits."""
        # Of the counters of norms nothing depends, and PyTorch makes up those that a file lacks
        model_keys = [key for key in self.model.state_dict() if not key.endswith("num_batches_tracked")]
        missing = sorted(_filter_reused_missing_keys(self.model, list(incompatible.missing_keys)))
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        unused = list(incompatible.unexpected_keys)
        if set(model_keys) <= set(incompatible.missing_keys):
            raise CheckpointError(
                f"{self.file} does not fit the model: none of its {len(self._keys)} tensors has the name of one "
                f"of the model's {len(model_keys)}.\n  in the file: {_shown(self._keys)}\n  in the model: "
                f"{_shown(model_keys)}\nIs it the file of another model? tools/convert_checkpoint.py names the model "
                "and converts the files of others (docs/checkpoints.md); else use the config that it was made with"
            )
        lines = [f"{len(model_keys) - len(missing)} of {len(model_keys)} tensors of the model are in {self.file}"]
        if missing:
            lines.append(f"not in the file: {len(missing)} ({_shown(missing)})")
        if unused:
            lines.append(f"unused in the file: {len(unused)} ({_shown(unused)})")
        if missing and self._complete:
            raise CheckpointError(
                f"{'; '.join(lines)}. To evaluate a model, all of it must be there, the rest would be random. Use the "
                "config that the file was made with; files of backbones, and those made with --drop-classes, "
                "--detector-only or --partial, are for training"
            )
        if missing or unused:
            self.logger.warning("; ".join(lines))
        else:
            self.logger.info(lines[0])

    def _mismatch(self, shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
        key = num_classes_key(self._cfg)
        lines = "\n".join(f"  {name}: {file} in the file, {model} in the model" for name, file, model in shapes[:8])
        if len(shapes) > 8:
            lines += f"\n  ... and {len(shapes) - 8} more"
        message = f"{self.file} does not fit the model: {len(shapes)} tensors have other shapes.\n{lines}\n"
        remedy = "Use the config that the file was made with, or take these tensors out of the file."
        if key is None:
            return message + remedy
        classes = get_key(self._cfg, key)
        heads = [name for name, file, model in shapes if model[:1] == (classes,) and file[1:] == model[1:]]
        if len(heads) < len(shapes):
            return message + remedy
        in_file = next(file[0] for _, file, _ in shapes)
        return message + (
            f"The file has {in_file} classes, {key} is {classes}. Set {key} {in_file} for the file's own classes. "
            "Training on others may start from it: its class head is left out then, unless it is frozen"
        )


def class_tensors(cfg: CfgNode, key: str, model: nn.Module) -> list[str]:
    """Names of the tensors of the config's model whose shapes depend on the number of classes, the value of ``key``."""
    other = cfg.clone()
    other.defrost()
    other.merge_from_list([key, get_key(cfg, key) + 1])
    larger = build_on_meta(other).state_dict()
    return [name for name, tensor in model.state_dict().items() if larger[name].shape != tensor.shape]


def find_checkpoint(folder: str | os.PathLike[str]) -> str:
    """The file of a run's best checkpoint where one was kept (``model_best.pth``), else of its last.

    Raises:
        FileNotFoundError: the folder has none.
    """
    best, last = Path(folder, "model_best.pth"), Path(folder, "last_checkpoint")
    if best.is_file():
        return str(best)
    if not last.is_file():
        raise FileNotFoundError(f"{folder} has no checkpoint: neither {best.name} nor {last.name} is there")
    return str(Path(folder, last.read_text().strip()))


def _shown(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
