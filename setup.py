from setuptools import find_packages, setup

setup(
    packages=["querymask"] + [f"querymask.{name}" for name in find_packages("projects")],
    package_dir={"querymask": "projects"},
    package_data={"querymask": ["*/configs/*.yaml"]},
)
