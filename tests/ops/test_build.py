"""The checks that setup.py makes before it compiles: every misfit is named with its remedy."""

import importlib.util
import os
import stat
import types
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, with no wishes in the environment."""
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("querymask_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_torch(cuda: str | None, gpus: tuple[tuple[int, int], ...] = ()) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __version__="2.15.0",
        version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(
            is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_capability=lambda i: gpus[i]
        ),
    )


@pytest.fixture
def toolkit(build, monkeypatch, tmp_path):
    """Installs a CUDA toolkit that says it has the given version."""

    def install(version: str) -> None:
        program(tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.88'")
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))

    return install


def test_the_compiler_here_passes(build):
    assert build.check_compiler(torch) == "c++"


def test_no_compiler(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler 'no-such-compiler'(.|\n)*What to do: install one"):
        build.check_compiler(torch)


def test_compiler_too_old(build, monkeypatch, tmp_path):
    old = program(tmp_path / "g++-4", '[ "$1" = --version ] && echo "g++-4 4.8.5" && exit; echo "bad -std" >&2; exit 1')
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(SystemExit, match=r"g\+\+-4 4.8.5 does not compile c\+\+(.|\n)*bad -std(.|\n)*use GCC 11 or"):
        build.check_compiler(torch)


def test_no_python_headers(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"no .*/Python.h(.|\n)*apt install python3\.\d+-dev"):
        build.check_compiler(torch)


def test_no_torch(build, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(SystemExit, match="torch is not installed(.|\n)*--no-build-isolation"):
        build.import_torch()


def test_cpu_only_without_a_gpu(build, monkeypatch, toolkit):
    """Whether there is an nvcc or not, and on every torch."""
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert build.check_cuda(fake_torch("13.2")) is None
    assert build.check_cuda(fake_torch(None)) is None
    toolkit("13.0")
    assert build.check_cuda(fake_torch("13.2")) is None


def test_cuda_with_a_gpu_or_by_force(build, monkeypatch, toolkit):
    toolkit("13.0")
    monkeypatch.setattr(build, "check_host_compiler", lambda cuda: None)
    assert build.check_cuda(fake_torch("13.2", gpus=((9, 0),))) == "13.0"
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert build.check_cuda(fake_torch("13.2")) == "13.0"
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert build.check_cuda(fake_torch("13.2", gpus=((9, 0),))) is None


def test_gpu_without_nvcc(build, monkeypatch, capsys):
    """Not an error, since the CPU operator is of use: but said."""
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert build.check_cuda(fake_torch("13.2", gpus=((9, 0),))) is None
    assert "although torch sees a GPU: there is no nvcc" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"no nvcc(.|\n)*install the CUDA toolkit 13\.2(.|\n)*unset FORCE_CUDA"):
        build.check_cuda(fake_torch("13.2"))


def test_cuda_versions_that_differ(build, toolkit):
    toolkit("12.8")
    with pytest.raises(SystemExit, match=r"nvcc is of CUDA 12\.8, .* for CUDA 13\.2(.|\n)*or set FORCE_CUDA=0"):
        build.check_cuda(fake_torch("13.2", gpus=((9, 0),)))


def test_torch_without_cuda(build, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="torch 2.15.0 is built without CUDA(.|\n)*unset FORCE_CUDA"):
        build.check_cuda(fake_torch(None))


def test_compiler_too_new_for_nvcc(build, monkeypatch, tmp_path):
    script = 'case "$1" in --version) echo "Free Software Foundation";; *) echo 77.1.0;; esac'
    monkeypatch.setenv("CXX", str(program(tmp_path / "g++", script)))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_GCC_VERSIONS", {"13.0": ((6, 0, 0), (16, 0))})
    with pytest.raises(SystemExit, match=r"GCC 77\.1\.0 is too new for nvcc 13\.0(.|\n)*set CXX=g\+\+-15"):
        build.check_host_compiler("13.0")
    build.check_host_compiler("13.9")  # of which torch's table says nothing


def test_architectures(build, monkeypatch):
    assert build.architectures(fake_torch("13.2")) == build.DEFAULT_ARCHITECTURES
    assert build.architectures(fake_torch("13.2", gpus=((9, 0), (8, 6), (9, 0)))) == "8.6;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert build.architectures(fake_torch("13.2", gpus=((9, 0),))) == "7.5"


def test_nvcc_behind_a_script(build, monkeypatch, tmp_path):
    """The toolkit is where nvcc itself says."""
    program(tmp_path / "bin" / "nvcc", f"echo '#$ TOP={tmp_path}/cuda/bin/..' >&2")
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "")  # so that what the function sets is undone
        monkeypatch.delenv(name)
    build.set_cuda_home()
    assert os.environ["CUDA_HOME"] == str(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    build.set_cuda_home()
    assert os.environ["CUDA_HOME"] == "/chosen"


def test_flags_that_the_compiler_lacks(build):
    assert build.compiles("c++", "int probe;", "-Werror", "-O3") is None
    assert "no-such-flag" in build.compiles("c++", "int probe;", "-Werror", "-fno-such-flag")


@pytest.mark.parametrize(
    ("command", "limited"), [("bdist_wheel", True), ("editable_wheel", False), ("build_ext", False)]
)
def test_a_wheel_serves_later_pythons(build, monkeypatch, command, limited):
    """It keeps to Python's stable ABI, to which torch's Python library does not; a clone has one for each Python."""
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setattr("sys.argv", ["setup.py", command])
    monkeypatch.chdir(SETUP.parent)
    extension = build.make_extension(torch)
    assert extension.py_limited_api is limited
    assert ("torch_python" in extension.libraries) is not limited
    monkeypatch.setattr(build.sysconfig, "get_config_var", lambda name: 1)  # a Python without its lock has none yet
    assert not build.serves_later_pythons()
