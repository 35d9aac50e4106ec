"""QueryMask: instance segmentation with object queries, as an extension of Detectron2.

Importing the package registers the meta-architectures, backbones and data sets with Detectron2. What it changes outside
of itself are two functions, which are called here and nowhere else: ``compat.apply_shims`` makes Detectron2 work with
current libraries, ``data.install`` reads DETECTRON2_DATASETS and has COCO's files read by the reader that checks. What
was imported before, Detectron2 included, stays in place.
"""

from querymask.common import compat

__version__ = "0.2.0"

if compat.detectron2_available():
    compat.apply_shims()

    from querymask import effseg, isda, istr, solq
    from querymask.common import backbones, data
    from querymask.config import add_querymask_config, get_cfg
    from querymask.inference import load

    data.install()

    __all__ = ["add_querymask_config", "backbones", "data", "effseg", "get_cfg", "isda", "istr", "load", "solq"]
else:

    def __getattr__(name: str) -> None:
        if name in ("add_querymask_config", "get_cfg", "load", "effseg", "isda", "istr", "solq"):
            raise ImportError(
                f"querymask.{name} needs Detectron2, which is not installed: see docs/installation.md. "
                "Without it only querymask.common.ops can be used."
            )
        raise AttributeError(f"module 'querymask' has no attribute {name!r}")
