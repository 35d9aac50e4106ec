"""The two kinds of files with exported models, and what they say about themselves."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

INPUTS = ("image", "size")
"""Names of the arguments of an exported model; see ``ExportNetwork.forward``."""
ENDINGS = (".onnx", ".pt2")
_ENTRY = "querymask.json"
Run = Callable[[Tensor, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Description:
    """What a reader of an exported model must know beside its inputs.

    Attributes:
        method: name of the meta-architecture.
        outputs: names of what the model returns, in order.
        class_names: of the classes; empty where they are not known.
        num_things: of a panoptic model, whose labels below it are things; None: a model of instances.
    """

    method: str
    outputs: Sequence[str]
    class_names: Sequence[str]
    num_things: int | None = None


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file is that of an exported model, in place of a checkpoint."""
    return Path(path).suffix in ENDINGS


def require(path: str | os.PathLike[str]) -> None:
    """Whether a file of this name can be written and read.

    Raises:
        ValueError: the ending is none of ``ENDINGS``.
        ImportError: for ONNX a package is missing.
    """
    if not is_exported(path):
        raise ValueError(f"{path}: the name of an exported model ends in {' or '.join(ENDINGS)}")
    if Path(path).suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"ONNX files need the packages onnx, onnxscript and onnxruntime ({error}): pip install "
                "'querymask[export]'"
            ) from error


def write(program: ExportedProgram, description: Description, path: str | os.PathLike[str]) -> None:
    """Write a program as the kind of file that the ending names; see :func:`require`."""
    require(path)
    text = json.dumps(asdict(description))
    if Path(path).suffix == ".pt2":
        torch.export.save(program, path, extra_files={_ENTRY: text})
    else:
        # Runtimes optimise by themselves; the exporter's own passes take minutes
        converted = torch.onnx.export(
            program,
            input_names=list(INPUTS),
            output_names=list(description.outputs),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        converted.model.metadata_props[_ENTRY] = text
        converted.save(os.fspath(path))


def read(path: str | os.PathLike[str], device: torch.device) -> tuple[Run, Description]:
    """The model of a file, as a function of ``INPUTS``.

    Raises:
        FileNotFoundError, ImportError: the file or the package that runs it is missing.
        ValueError: the file is not one that :func:`write` wrote, or its kind does not run on the device.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"MODEL.WEIGHTS names {path}, which is not there: write it with tools/export_model.py")
    if device.type != "cpu":
        raise ValueError(f"{path} is an exported model, which runs on the CPU, not on {device}: set MODEL.DEVICE cpu")
    require(path)
    reader = _read_onnx if Path(path).suffix == ".onnx" else _read_program
    run, text = reader(os.fspath(path))
    if not text:
        raise ValueError(f"{path} does not say what it computes: write it with tools/export_model.py")
    return run, Description(**json.loads(text))


def _read_program(path: str) -> tuple[Run, str]:
    entries = {_ENTRY: ""}
    module = torch.export.load(path, extra_files=entries).module()
    # As a function: the module would refuse the eval() of the model that holds it
    return lambda *tensors: module(*tensors), entries[_ENTRY]


def _read_onnx(path: str) -> tuple[Run, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> list[Tensor]:
        inputs = {name: np.ascontiguousarray(x.numpy()) for name, x in zip(INPUTS, tensors, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, inputs)]

    return run, session.get_modelmeta().custom_metadata_map.get(_ENTRY, "")
