"""What ONNX files need beside torch."""

import pytest


def skip_without_onnx() -> None:
    """Skip the test where a package of the extra ``export`` is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
