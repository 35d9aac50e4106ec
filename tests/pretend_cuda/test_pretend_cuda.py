"""Runs ``check_*.py`` on the pretended GPU, in a process of their own: here, torch must go on without one."""

import os
import subprocess
import sys
from pathlib import Path

import pretend_cuda
import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    pretend_cuda.missing() is not None, reason=f"no pretended GPU: {pretend_cuda.missing()}"
)


def test_on_the_pretended_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "pretend_plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += ["-o", "python_files=check_*.py", str(HERE)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
