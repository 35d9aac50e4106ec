"""The package mapping and the C++/CUDA extension; everything else is in pyproject.toml."""

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

extension = CppExtension(
    "querymask._C",
    ["csrc/registration.cpp", "csrc/msda/check.cpp", "csrc/msda/cpu.cpp"],
    extra_compile_args=["-O3", "-fopenmp"],
    extra_link_args=["-fopenmp"],
)
setup(
    packages=["querymask"] + [f"querymask.{name}" for name in find_packages("projects")],
    package_dir={"querymask": "projects"},
    package_data={"querymask": ["*/configs/*.yaml"]},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
