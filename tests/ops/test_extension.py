"""Loading of the extension, and what happens without one."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from querymask.common.ops import extension, multi_scale_deformable_attention, registration
from querymask.common.ops.extension import Extension, incompatibility

BUILD = {"torch": "2.15.0", "cuda": "13.0", "cuda_architectures": "9.0", "compiler": "g++", "threads": "OpenMP"}


def test_extension_is_in_use():
    """All other tests of the operators would compare the PyTorch form with itself."""
    assert extension.EXTENSION.error is None
    assert extension.EXTENSION.build["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert extension.use_kernels(torch.device("cpu"))
    assert hasattr(torch.ops.querymask, "multi_scale_deformable_attention_backward")


def test_build_is_read_without_loading():
    """What Python finds in the file is what the library says of itself."""
    from querymask import _C

    build = extension.read_build(extension.EXTENSION.path)
    assert set(build) == set(BUILD)
    for text in build.values():
        assert text and text in _C.build_info


@pytest.mark.parametrize(
    ("build", "torch_version", "cuda", "message"),
    [
        (BUILD, "2.15.1+cu132", "13.2", None),
        (BUILD, "2.15.0a0+git123", "13.0", None),
        (BUILD | {"cuda": "none"}, "2.15.0+cpu", None, None),
        (BUILD, "2.16.0", "13.0", "built for torch 2.15.0, but torch 2.16.0 is running"),
        (BUILD, "3.15.0", "13.0", "built for torch 2.15.0, but torch 3.15.0 is running"),
        (BUILD, "2.15.0", "12.8", "built with CUDA 13.0, but torch is built for CUDA 12.8"),
        (BUILD, "2.15.0+cpu", None, "built with CUDA 13.0, but torch is built for CUDA None"),
        ({}, "2.15.0", None, "not built by this project's setup.py"),
    ],
)
def test_incompatibility(build, torch_version, cuda, message):
    found = incompatibility(build, torch_version, cuda)
    if message is None:
        assert found is None
    else:
        assert message in found
        assert "pip install -e . --no-build-isolation" in found


def test_no_library(tmp_path):
    found = extension.load(tmp_path)
    assert found.path is None
    assert not found.device_types
    assert re.search(r"there is no extension for this Python in .*pip install", found.error)


def test_damaged_library(tmp_path):
    suffix = "".join(extension.EXTENSION.path.suffixes)
    for content in (b"", b"not a library", b'querymask-build{"torch": \0'):
        (tmp_path / f"_C{suffix}").write_bytes(content)
        found = extension.load(tmp_path)
        assert found.path == tmp_path / f"_C{suffix}"
        assert found.error is not None and "pip install" in found.error


def test_library_for_another_torch(tmp_path):
    """Refused before it is loaded, by the text in the file."""
    source = extension.EXTENSION.path
    version = extension.EXTENSION.build["torch"].encode()
    library = tmp_path / source.name
    text = b'querymask-build{"torch": "' + version
    assert text in source.read_bytes()
    other = version.replace(b".", b"#")[: len(version)]
    library.write_bytes(source.read_bytes().replace(text, b'querymask-build{"torch": "' + other))
    found = extension.load(tmp_path)
    assert f"was built for torch {other.decode()}, but torch {torch.__version__} is running" in found.error


def test_library_of_older_sources(monkeypatch):
    """Not used, even for what it has: its kernels may differ from the present ones."""
    monkeypatch.setattr(extension, "EXTENSION", extension.EXTENSION)
    assert extension.provides(registration.OPERATORS)
    assert not extension.provides(["sparse_conv2d", "made_up_tomorrow"])
    assert re.search(
        r"does not fit: it was built from older sources, without made_up_tomorrow\. .*pip install",
        extension.EXTENSION.error,
    )
    assert not extension.EXTENSION.device_types
    assert not extension.provides(registration.OPERATORS)


@pytest.fixture
def without_extension(monkeypatch):
    error = f"there is no extension here. {extension.REMEDY}"
    monkeypatch.setattr(extension, "EXTENSION", Extension(None, {}, error))
    monkeypatch.setattr(extension, "_warned", set())
    monkeypatch.delenv(extension.REQUIRE_VARIABLE, raising=False)


def test_fall_back_warns_once(without_extension, make_msda_inputs):
    inputs = make_msda_inputs()
    with pytest.warns(UserWarning, match="there is no extension here.*pip install.*computed by PyTorch") as caught:
        first = multi_scale_deformable_attention(*inputs)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the caller of the operator
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = multi_scale_deformable_attention(*inputs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.ops.querymask.multi_scale_deformable_attention(*inputs.flat))


@pytest.mark.parametrize("setting", ["1", "yes"])
def test_fall_back_can_be_forbidden(setting, without_extension, monkeypatch, make_msda_inputs):
    monkeypatch.setenv(extension.REQUIRE_VARIABLE, setting)
    with pytest.raises(RuntimeError, match="there is no extension here.*QUERYMASK_REQUIRE_EXTENSION is set"):
        multi_scale_deformable_attention(*make_msda_inputs())


@pytest.mark.parametrize("setting", ["", "0"])
def test_fall_back_is_not_forbidden_by(setting, without_extension, monkeypatch, make_msda_inputs):
    monkeypatch.setenv(extension.REQUIRE_VARIABLE, setting)
    with pytest.warns(UserWarning):
        multi_scale_deformable_attention(*make_msda_inputs())


def test_devices_without_kernels(monkeypatch):
    """A GPU with an extension built for the CPU, and devices that have no kernels at all."""
    monkeypatch.setattr(extension, "EXTENSION", Extension(Path("_C.so"), BUILD | {"cuda": "none"}, None))
    monkeypatch.setattr(extension, "_warned", set())
    assert extension.use_kernels(torch.device("cpu"))
    with pytest.warns(UserWarning, match="no kernels for cuda devices: it was built without CUDA. Build it"):
        assert not extension.use_kernels(torch.device("cuda"))
    with pytest.warns(UserWarning, match="no kernels for mps devices"):
        assert not extension.use_kernels(torch.device("mps"))
    monkeypatch.setattr(extension, "EXTENSION", Extension(Path("_C.so"), BUILD, None))
    assert extension.use_kernels(torch.device("cuda"))


def test_reference_only(make_msda_inputs):
    """For export: the graph has no operator of ours, and nothing is warned about."""
    inputs = make_msda_inputs()

    class Layer(torch.nn.Module):
        def forward(self, value, locations, weights):
            return multi_scale_deformable_attention(value, inputs.spatial_shapes, locations, weights)

    with warnings.catch_warnings(), extension.reference_only():
        warnings.simplefilter("error", UserWarning)
        exported = torch.export.export(Layer(), inputs.tensors)
    assert "querymask" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs.tensors), multi_scale_deformable_attention(*inputs))
    assert "querymask" in str(torch.export.export(Layer(), inputs.tensors).graph)


def copy_of_operators(folder: Path) -> Path:
    """A package ``querymask`` in ``folder`` that has the operators alone, without the compiled part."""
    package = folder / "querymask"
    shutil.copytree(Path(extension.__file__).parent, package / "common" / "ops")
    for part in (package, package / "common"):
        (part / "__init__.py").touch()
    return package


def test_import_without_the_library(tmp_path):
    """A copy of the operators without the compiled part imports and computes."""
    copy_of_operators(tmp_path)
    code = """
import torch
from querymask.common.ops import extension, multi_scale_deformable_attention
assert "no extension for this Python" in extension.EXTENSION.error
arguments = torch.rand(1, 4, 1, 3), [(2, 2)], torch.rand(1, 5, 1, 1, 2, 2), torch.rand(1, 5, 1, 1, 2)
print(multi_scale_deformable_attention(*arguments).shape)
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "torch.Size([1, 5, 3])"
    assert finished.stderr.count("extension is not in use") == 1


NEW_OPERATOR = """
import torch
from querymask.common.ops.registration import register_operator

__all__ = ["square"]
library = torch.library.Library("querymask", "FRAGMENT")
library.define("square(Tensor x) -> Tensor")
library.define("square_backward(Tensor grad, Tensor x) -> Tensor")
library.impl("square", lambda x: x * x, "CPU")
library.impl("square_backward", lambda grad, x: 2 * grad * x, "CPU")

def square(x):
    return torch.ops.querymask.square(x)

register_operator(
    "square",
    fake=torch.empty_like,
    fake_backward=lambda grad, x: torch.empty_like(x),
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, grad: torch.ops.querymask.square_backward(grad, *ctx.saved_tensors),
    multiply_adds=lambda x: x[0],
)
"""


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_new_operator_is_a_new_folder(has_kernels, tmp_path):
    """That is found without a list. A library that was built before it came is not used."""
    package = copy_of_operators(tmp_path)
    shutil.copy(extension.EXTENSION.path, package)
    (package / "common" / "ops" / "square").mkdir()
    kernels = NEW_OPERATOR if has_kernels else NEW_OPERATOR.replace("\nlibrary.", "\n# library.")
    (package / "common" / "ops" / "square" / "__init__.py").write_text(kernels)
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from querymask.common.ops import extension, fvcore_handles, square
assert "querymask::square" in fvcore_handles()
if extension.EXTENSION.error is not None:
    print(extension.EXTENSION.error)
else:
    x = torch.tensor([2.0, 3.0, 4.0], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        square(x).sum().backward()
    print(x.grad.tolist(), counter.get_total_flops())
    print(square(torch.empty(3, device="meta")).shape)
"""
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    if has_kernels:
        assert finished.stdout.split("\n")[:2] == ["[4.0, 6.0, 8.0] 18", "torch.Size([3])"]
    else:
        assert "built from older sources, without square, square_backward. Build it" in finished.stdout
