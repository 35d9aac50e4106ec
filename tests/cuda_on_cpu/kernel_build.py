"""Builds the translated kernels as a library for torch, with g++ alone; what is built already is not built again."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from kernel_translation import translate

HERE = Path(__file__).parent
SIMULATOR = HERE / "simulator"
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / "build" / "cuda_on_cpu"
KEPT_FILES = 60  # of the cache


@dataclass(frozen=True)
class Variant:
    """How the kernels are compiled, and the runtime around them."""

    kernels: tuple[str, ...]
    runtime: tuple[str, ...] = ("-O2",)
    link: tuple[str, ...] = ()


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")
VARIANTS = {
    "plain": Variant(("-O1",)),
    "fused": Variant(("-O2", "-mfma", "-ffp-contract=fast")),  # multiply-adds rounded once, as nvcc's
    "races": Variant(("-O1", "-fsanitize=thread"), ("-O2", "-DSIMULATED_RACES")),
    "sanitizers": Variant(
        ("-O1", "-fno-omit-frame-pointer", *SANITIZERS), ("-O1", "-fno-omit-frame-pointer", *SANITIZERS), SANITIZERS
    ),
}


def missing() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        return "the simulation of CUDA kernels switches threads by x86-64 instructions, on Linux"
    if shutil.which("g++") is None:
        return "the simulation of CUDA kernels needs g++"
    return None


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """One process at a time builds ``target``; the others wait, and find it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)


def run_compiler(what: str, arguments: list[str]) -> None:
    finished = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"g++ does not {what} the translated kernels:\n{finished.stderr[:6000]}")


class Builder:
    """Builds from a folder ``csrc`` for GPUs of a compute capability, 900 for 9.0."""

    def __init__(self, csrc: Path, variant: str, arch: int = 900, edit: Callable[[str, str], str] | None = None):
        self.csrc, self.variant, self.arch = csrc.resolve(), VARIANTS[variant], arch
        self.edit = edit or (lambda path, text: text)  # changes a source, given by its name in csrc
        self.headers: Path | None = None
        torch_folder = Path(torch.__file__).parent
        self.torch_libraries = torch_folder / "lib"
        include = torch_folder / "include"
        self.flags = [
            *("-std=c++20", "-fPIC", "-g1", "-w", f"-DSIMULATED_ARCH={arch}"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{SIMULATOR}", f"-I{SIMULATOR / 'include'}"),
            *("-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")),
        ]

    def sources(self, operator: str) -> dict[str, str]:
        """Translated sources of an operator by their names."""
        found = {}
        for path in sorted([*self.csrc.glob("*.h"), *(self.csrc / operator).iterdir()]):
            name = str(path.relative_to(self.csrc))
            if path.suffix in (".h", ".cu") or path.name == "check.cpp":
                found[name] = translate(self.edit(name, path.read_text()), f"csrc/{name}")
        found["tensor_core.h"] = f'#include "{SIMULATOR / "tensor_core.h"}"\n'
        found["operator_sources.h"] = "".join(f'#include "{name}"\n' for name in found if not name.endswith(".h"))
        return found

    def key(self, *parts: str) -> str:
        digest = hashlib.sha256()
        simulator = [path.read_text() for path in sorted(SIMULATOR.rglob("*.h"))]
        version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
        for part in (*parts, *simulator, *self.flags, version, torch.__version__, str(CACHE)):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:20]

    def precompile(self, folder: Path) -> None:
        """Compiles ``simulator/headers.h`` into ``folder``, 400 MB: reading it is half of each operator's build."""
        self.headers = folder / f"{self.key(*self.variant.kernels)}.h"
        made = f"{self.headers}.gch"
        if not os.path.exists(made):
            options = (*self.flags, *self.variant.kernels, "-x", "c++-header", str(SIMULATOR / "headers.h"))
            run_compiler("compile", [*options, "-o", made])

    def compile(self, name: str, flags: tuple[str, ...], sources: dict[str, str]) -> Path:
        """The object file of ``simulator/NAME.cpp`` with the sources that it includes."""
        key = self.key(
            (SIMULATOR / f"{name}.cpp").read_text(), *flags, *(text for pair in sources.items() for text in pair)
        )
        target = CACHE / f"{name}-{key}.o"
        with alone(target):
            if target.is_file():
                target.touch()
            else:
                self.compile_to(target, name, flags, sources)
        return target

    def compile_to(self, target: Path, name: str, flags: tuple[str, ...], sources: dict[str, str]) -> None:
        with TemporaryDirectory(dir=CACHE) as folder:
            for path, text in sources.items():
                (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / path).write_text(text)
            made = Path(folder, "made.o")
            source = str(SIMULATOR / f"{name}.cpp")
            included = ["-include", str(self.headers)] if self.headers and name == "operator" else []
            run_compiler("compile", [*self.flags, *flags, *included, f"-I{folder}", "-c", source, "-o", str(made)])
            os.replace(made, target)

    def build(self) -> Path:
        """The library."""
        objects = [self.compile(name, self.variant.runtime, {}) for name in ("scheduler", "races", "atomics")]
        objects += [
            self.compile("operator", (*self.variant.kernels, f"-DOPERATOR={operator}"), self.sources(operator))
            for operator in sorted(path.parent.name for path in self.csrc.glob("*/cuda.cu"))
        ]
        target = CACHE / f"kernels-{self.key(*map(str, objects), *self.variant.link)}.so"
        if target.is_file():
            target.touch()
            return target
        libraries = [f"-L{self.torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        libraries += [f"-Wl,-rpath,{self.torch_libraries}", "-ldl"]
        with alone(target), TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder, "made.so")
            run_compiler("link", ["-shared", *self.variant.link, "-o", str(made), *map(str, objects), *libraries])
            os.replace(made, target)
        for old in newest_first(CACHE)[KEPT_FILES:]:
            if old.is_file():
                old.unlink(missing_ok=True)
        return target
