"""Operators with compiled kernels. Needs torch alone: nothing here imports Detectron2.

Every folder is one operator, which registers itself when it is imported, and whose public names are found here as well.
"""

import importlib
import pkgutil

from querymask.common.ops.registration import flop_formulas, fvcore_handles

__all__ = ["flop_formulas", "fvcore_handles"]

for _found in pkgutil.iter_modules(__path__, f"{__name__}."):
    if _found.ispkg:
        _operator = importlib.import_module(_found.name)
        globals().update({name: getattr(_operator, name) for name in _operator.__all__})
        __all__ += _operator.__all__
