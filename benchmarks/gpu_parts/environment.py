"""Gets a checkout ready to run on a machine without a network: Detectron2 from files, this package, its kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts.results import Part

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu_site"
"""Where packages from files are put, beside nothing that is installed."""

PROBE = """
import importlib.util, json, torch
found = {"torch": torch.__version__, "gpu": torch.cuda.is_available(), "extension": "", "devices": []}
if not found["gpu"]:
    print(json.dumps(found))
    raise SystemExit
spec = importlib.util.find_spec("querymask")
found["querymask"] = None if spec is None else spec.origin
if spec is not None:
    from querymask.common.ops.extension import EXTENSION
    found["extension"], found["devices"] = EXTENSION.error or "", sorted(EXTENSION.device_types)
try:
    import querymask, detectron2
    found["detectron2"] = detectron2.__version__
except ImportError as error:
    found["detectron2"] = None
    found["missing"] = str(error)
print(json.dumps(found))
"""


def prepare(part: Part, detectron2: Sequence[Path], pretended: bool) -> str | None:
    """Make everything importable for the processes that are started after it.

    Args:
        detectron2: folders that hold packages, or wheels or folders of wheels.

    Returns:
        what is missing, with the remedy; None if nothing is.
    """
    add_to_path(part, detectron2)
    if pretended:
        part.note("The card is pretended: what is installed is used as it is.")
        return None
    found = probe()
    if not found["gpu"]:
        return "torch sees no GPU here. A trial run without one: --pretend"
    if found["querymask"] is None:
        SITE.mkdir(parents=True, exist_ok=True)
        if not (SITE / "querymask").exists():
            (SITE / "querymask").symlink_to(ROOT / "projects", target_is_directory=True)
        extend_path(SITE)
        part.note("`querymask` is not installed: it is imported from the checkout.")
        found = probe()
    row = part.table("Found", "", "")
    row("torch", found["torch"])
    row("Detectron2", found["detectron2"] or f"cannot be imported: {found['missing']}")
    if "cuda" not in found["devices"]:
        reason = found["extension"] or "it was built without CUDA"
        part.note(f"The kernels are built for this card, because of the extension: {reason}")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=ROOT, env=os.environ | {"FORCE_CUDA": "1"}, capture_output=True, text=True)
        if built.returncode:
            part.fail("setup.py build_ext --inplace", (built.stdout + built.stderr)[-20000:])
        found = probe()
        if "cuda" not in found["devices"]:
            return f"there are no kernels for CUDA: {found['extension'] or 'see above'}"
    row("extension", found["extension"] or f"in use on {', '.join(found['devices'])}")
    if found["detectron2"] is None:
        return f"Detectron2 cannot be imported ({found['missing']}): name its folder or wheels with --detectron2"
    return None


def add_to_path(part: Part, paths: Sequence[Path]) -> None:
    """Install wheels to ``SITE``, and put it and folders of packages on the path.

    Raises:
        FileNotFoundError: a path holds neither.
    """
    wheels: list[Path] = []
    for path in (path.resolve() for path in paths):
        inside = [path] if path.suffix == ".whl" and path.is_file() else sorted(path.glob("*.whl"))
        wheels += inside
        if (path / "detectron2" / "__init__.py").exists():
            extend_path(path)
        elif not inside:
            raise FileNotFoundError(f"--detectron2 {path}: there is no wheel and no package detectron2 in it")
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(SITE), *map(str, wheels)], check=True)
        extend_path(SITE)
        part.note(f"Installed from files: {', '.join(path.name for path in wheels)}")


def extend_path(folder: Path) -> None:
    """Let processes that are started from now on import from a folder, before all others."""
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def probe() -> dict[str, Any]:
    """What a new process finds."""
    finished = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"this Python cannot look around: {finished.stderr[-4000:]}")
    return json.loads(finished.stdout.splitlines()[-1])
