"""The wheel: it holds every module and config, and works without the sources. Its compiled part is tested elsewhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# setup.py as it is, but for the extension, whose compilation takes minutes
BUILD = """
import importlib.util, setuptools, sys
spec = importlib.util.spec_from_file_location("querymask_setup", "setup.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.make_extension = lambda torch: None
module.setup = lambda **options: setuptools.setup(**{**options, "ext_modules": []})
sys.argv = ["setup.py", "-q", "bdist_wheel", "-d", "dist"]
module.main()
"""
USE = """
import querymask
from detectron2.modeling import META_ARCH_REGISTRY
from pathlib import Path
folder = Path(querymask.__file__).parent
cfg = querymask.get_cfg()
cfg.merge_from_file(str(folder / "solq" / "configs" / "ablations" / "stages_1.yaml"))
registered = all(name in META_ARCH_REGISTRY for name in ("SOLQ", "ISDA", "ISTR", "EffSeg"))
print(folder, cfg.MODEL.META_ARCHITECTURE, registered)
"""


def run(code: str, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_has_everything_and_works_alone(tmp_path: Path) -> None:
    source, installed, empty = (tmp_path / name for name in ("source", "installed", "empty"))
    for folder in (source, empty):
        folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "projects", source / "projects", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run(BUILD, source)
    (wheel,) = (source / "dist").glob("querymask-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    wanted = {
        path.relative_to(ROOT / "projects")
        for path in (ROOT / "projects").rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert wanted == {path.relative_to(installed / "querymask") for path in (installed / "querymask").rglob("*.*")}
    folder, architecture, registered = run(USE, empty, PYTHONPATH=str(installed)).splitlines()[-1].split()
    assert (folder, architecture, registered) == (str(installed / "querymask"), "SOLQ", "True")
