"""pytest's plugin: the tests run on the pretended GPU, and the models of ``tests/support`` are built for it."""

import os

import pretend_cuda

os.environ.setdefault("QUERYMASK_TEST_DEVICE", "cuda")
pretend_cuda.install()


def pytest_configure() -> None:
    import querymask  # noqa: F401

    pretend_cuda.adopt_querymask()
