"""Reading checkpoint files of others without running anything that they contain, and writing our own."""

import argparse
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from querymask.common.checkpoint.pickles import load_arrays
from querymask.common.checkpoint.rules import CheckpointError, State

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state")
"""Where training code of the field puts the model's state dict; the first one that is there counts."""
# First bytes of the formats: a zip archive, and the pickled magic number of PyTorch before 1.6
_ZIP = b"PK\x03\x04"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_checkpoint(path: str | os.PathLike[str]) -> State:
    """Read the model's tensors from a file: PyTorch's, a ``.pkl`` of Detectron2, or safetensors.

    Nothing in the file is executed. Of classes, only tensors, arrays and plain containers are accepted, and
    ``argparse.Namespace``, in which training scripts keep their arguments.

    Returns:
        the state dict on the CPU, without a ``module.`` in front of every key.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or with a class that is not accepted.
    """
    return _state_dict(read_content(path), Path(path))


def read_content(path: str | os.PathLike[str]) -> Any:
    """All that a file holds, read as ``read_checkpoint`` does: usually a dictionary, of which the model is one entry.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or with a class that is not accepted.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(_LEGACY_TORCH))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from error
    if not head:
        raise CheckpointError(f"{path}: an empty file, not a checkpoint. Download it again, or take an earlier one.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if head.startswith(_ZIP) or head == _LEGACY_TORCH:
        return _read_torch(path)
    if head.startswith(b"\x80"):
        return load_arrays(path)
    raise CheckpointError(
        f"{path}: not a checkpoint (neither PyTorch's format, nor a pickle, nor safetensors). "
        "A download that failed often leaves a web page or a pointer file: look at its size and first lines."
    )


def write_checkpoint(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], author: str, class_names: Sequence[str] = ()
) -> None:
    """Write a file that ``MODEL.WEIGHTS`` loads by its exact keys.

    Args:
        author: where the weights come from, for the log of whoever loads them.
        class_names: of the model's classes, in order, if they are known.
    """
    path = Path(path)
    if path.suffix != ".pth":
        raise CheckpointError(f"{path}: the name must end in .pth, Detectron2 reads other suffixes as other formats.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Rows that were picked from a larger tensor would drag the whole of it into the file
    content = {"model": {key: value.clone() for key, value in state.items()}, "__author__": author}
    torch.save({**content, "class_names": list(class_names)} if class_names else content, partial)
    partial.replace(path)


def _read_torch(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):  # PyTorch itself looks at no checksum
            with zipfile.ZipFile(path) as archive:
                if record := archive.testzip():
                    raise ValueError(f"the checksum of {record} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises whatever its parts raise, from KeyError to RuntimeError
        refused = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if "Weights only load failed" in str(error) and refused:
            raise CheckpointError(
                f"{path}: refers to {refused[1]}, which is code rather than weights; it was not run. "
                "If the source of the file is trustworthy, save its state dict alone with the program that made it."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: damaged or incomplete ({reason}). Download it again.") from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # the library has an exception of its own that is not public
        raise CheckpointError(f"{path}: damaged or incomplete ({error}). Download it again.") from error


def _state_dict(content: Any, path: Path) -> State:
    """The model's tensors in what a file contained."""
    for key in MODEL_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} where a state dict was expected.")
    state = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(key, str) and isinstance(value, Tensor):
            state[key] = value.detach()
    if not state:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise CheckpointError(f"{path}: no tensors in it (its entries: {keys}).")
    if all(key.startswith("module.") for key in state):  # DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state
