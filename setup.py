"""The package mapping and the C++/CUDA extension; everything else is in pyproject.toml.

Environment variables:
    FORCE_CUDA: ``1`` builds the CUDA kernels though torch sees no GPU, ``0`` never builds them.
    TORCH_CUDA_ARCH_LIST: compute capabilities to build for, e.g. ``"8.0;9.0+PTX"``; default: those of the GPUs here.
    CUDA_HOME, CXX, MAX_JOBS: as for every extension of torch.

Before anything is compiled, the compiler, CUDA and torch are checked against each other; what does not fit is named
with its remedy.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

from setuptools import find_packages, setup

DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"  # where no GPU tells; PTX serves later ones

# Loops are written to be vectorised over channels. GCC's unroll-and-jam would merge iterations of the loop around them
# and leave scalar code; and both compilers refuse to vectorise comparisons while floating-point traps are to be kept.
KERNEL_FLAGS = ["-fno-trapping-math", "-fno-math-errno", "-fno-loop-unroll-and-jam"]


def fail(problem: str, remedy: str) -> NoReturn:
    raise SystemExit(f"\nQueryMask cannot be built: {problem}\n  What to do: {remedy}\n")


def import_torch():
    try:
        import torch
    except ImportError:
        fail(
            f"torch is not installed in the environment of the build ({sys.prefix}).",
            "install torch and setuptools first, then `pip install -e . --no-build-isolation`, which builds for that "
            "torch; or use `uv run`, which does both.",
        )
    return torch


def set_cuda_home() -> None:
    """Sets CUDA_HOME to the toolkit of the nvcc on the PATH, which may be a link or a script somewhere else."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if found := re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(found.group(1)).resolve())


def sources(pattern: str) -> list[str]:
    """The files of all operators that match, and those that they share."""
    return sorted(path.as_posix() for path in Path("csrc").rglob(pattern))


def compiles(compiler: str, code: str, *flags: str) -> str | None:
    """Returns None if ``code`` compiles and links to a library, else the compiler's output."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        command = [*compiler.split(), *flags, "-fPIC", "-shared", str(source), "-o", str(source.with_suffix(".so"))]
        finished = subprocess.run(command, capture_output=True, text=True)
        return None if finished.returncode == 0 else finished.stdout + finished.stderr


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def check_compiler(torch) -> str:
    """Returns the C++ compiler's command after trying what torch's headers ask of it."""
    compiler = os.environ.get("CXX", "c++")
    install = "install one (Debian, Ubuntu: `apt install g++`; macOS: `xcode-select --install`) or name it in CXX."
    if shutil.which(compiler.split()[0]) is None:
        fail(f"there is no C++ compiler {compiler!r}.", install)
    from torch.utils import cpp_extension

    standard = "-std=c++20" if "c++20" in Path(cpp_extension.__file__).read_text() else "-std=c++17"  # that it will use
    headers = f"#include <{'concepts' if standard.endswith('20') else 'optional'}>\nint probe;\n"
    if (output := compiles(compiler, headers, standard)) is not None:
        name = first_line([*compiler.split(), "--version"]) or compiler
        fail(
            f"{name} does not compile {standard[5:]}, which torch {torch.__version__} is written in:\n{output}",
            "use GCC 11 or Clang 14 or later: install one and name it in CXX, e.g. `CXX=g++-12`.",
        )
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        fail(
            f"the headers of this Python are missing: there is no {include}/Python.h.",
            f"install them (Debian, Ubuntu: `apt install python3.{sys.version_info.minor}-dev`) or use a Python of uv.",
        )
    return compiler


def find_nvcc() -> tuple[Path, str] | None:
    """Returns the path and version of the nvcc that torch would use."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    if nvcc is None or not nvcc.is_file():
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", output)
    return (nvcc, found.group(1)) if found else None


def check_cuda(torch) -> str | None:
    """Returns nvcc's version if the CUDA kernels are to be built."""
    wish = os.environ.get("FORCE_CUDA", "")
    forced = wish not in ("", "0")
    if wish == "0" or not (forced or (torch.cuda.is_available() and torch.version.cuda)):
        return None
    if torch.version.cuda is None:
        fail(
            f"FORCE_CUDA is set, but torch {torch.__version__} is built without CUDA.",
            "install a torch with CUDA (https://pytorch.org/get-started), or unset FORCE_CUDA to build for the CPU.",
        )
    nvcc = find_nvcc()
    toolkit = f"install the CUDA toolkit {torch.version.cuda} (https://developer.nvidia.com/cuda-downloads)"
    if nvcc is None:
        problem = "there is no nvcc: neither on the PATH nor in CUDA_HOME."
        if forced:
            fail(problem, f"{toolkit} and set CUDA_HOME to its folder, or unset FORCE_CUDA to build for the CPU.")
        print(f"QueryMask is built without CUDA kernels, although torch sees a GPU: {problem} {toolkit} to have them.")
        return None
    path, version = nvcc
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        fail(
            f"{path} is of CUDA {version}, torch {torch.__version__} is built for CUDA {torch.version.cuda}; "
            "their first numbers must agree.",
            f"{toolkit} and set CUDA_HOME to its folder, or install a torch for CUDA {version}, or set FORCE_CUDA=0 "
            "to build for the CPU.",
        )
    check_host_compiler(version)
    return version


def check_host_compiler(cuda: str) -> None:
    """Names a GCC that is too new for nvcc, by torch's table."""
    from torch.utils import cpp_extension

    limits = getattr(cpp_extension, "CUDA_GCC_VERSIONS", {}).get(cuda)
    compiler = os.environ.get("CXX", "c++").split()
    if (
        limits is None
        or "Free Software Foundation"
        not in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    ):
        return
    version = first_line([*compiler, "-dumpfullversion", "-dumpversion"])
    if (major := int(version.split(".")[0])) >= limits[1][0]:
        fail(
            f"GCC {version} is too new for nvcc {cuda}, which takes versions before {limits[1][0]}.",
            f"install g++-{limits[1][0] - 1} and set CXX=g++-{limits[1][0] - 1} and CC=gcc-{limits[1][0] - 1}, or "
            f"install a CUDA toolkit that takes GCC {major}.",
        )


def architectures(torch) -> str:
    """Compute capabilities to build for, as in TORCH_CUDA_ARCH_LIST."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found)) + "+PTX" if found else DEFAULT_ARCHITECTURES


def serves_later_pythons() -> bool:
    """Whether the extension keeps to Python's stable ABI: in wheels. In a clone each Python has its own."""
    return "bdist_wheel" in sys.argv and not sysconfig.get_config_var("Py_GIL_DISABLED")


def make_extension(torch):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    compiler = check_compiler(torch)
    cuda = check_cuda(torch)
    flags = [
        "-O3",
        "-g0",
        *[flag for flag in KERNEL_FLAGS if compiles(compiler, "int probe;", "-Werror", flag) is None],
    ]
    threads = ["-fopenmp"] if compiles(compiler, "#include <omp.h>\nint probe;\n", "-fopenmp") is None else []
    if not threads:
        flags.append("-fopenmp-simd")
        print(f"{compiler} has no OpenMP: QueryMask's CPU kernels will use one thread.")
    options = {
        "sources": sources("*.cpp"),
        "extra_compile_args": {"cxx": [*flags, *threads]},
        "extra_link_args": threads,
        "depends": sources("*.h"),
        "py_limited_api": serves_later_pythons(),
    }
    if cuda is None:
        print(f"QueryMask is built for the CPU with {compiler}, torch {torch.__version__}.")
        return CppExtension("querymask._C", **options)
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen = architectures(torch)
    print(f"QueryMask is built with {compiler}, CUDA {cuda} for {chosen}, torch {torch.__version__}.")
    options["sources"] += sources("*.cu")
    options["extra_compile_args"]["nvcc"] = ["-O3"]
    options["define_macros"] = [
        ("QUERYMASK_CUDA_VERSION", cuda),
        ("QUERYMASK_CUDA_ARCHITECTURES", "/".join(re.split(r"[;,\s]+", chosen.strip()))),
    ]
    return CUDAExtension("querymask._C", **options)


def main() -> None:
    torch = import_torch()
    set_cuda_home()
    from torch.utils.cpp_extension import BuildExtension

    setup(
        packages=["querymask"] + [f"querymask.{name}" for name in find_packages("projects")],
        package_dir={"querymask": "projects"},
        package_data={"querymask": ["*.yaml", "*/configs/*.yaml", "*/configs/*/*.yaml"]},
        ext_modules=[make_extension(torch)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if serves_later_pythons() else {},
    )


if __name__ == "__main__":
    main()
