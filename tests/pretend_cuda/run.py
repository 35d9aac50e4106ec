"""Runs a script on the pretended GPU: ``python tests/pretend_cuda/run.py SCRIPT ARGUMENTS ...``"""

import runpy
import sys
from pathlib import Path

import pretend_cuda

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    pretend_cuda.install()
    import querymask  # noqa: F401

    pretend_cuda.adopt_querymask()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
