"""ISDA: position-aware instance segmentation with deformable attention (Ying et al. 2022)."""

from querymask.isda import checkpoint
from querymask.isda.config import add_isda_config
from querymask.isda.isda import ISDA

__all__ = ["ISDA", "add_isda_config", "checkpoint"]
