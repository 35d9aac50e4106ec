"""EffSeg: fine-grained instance segmentation on structure-preserving sparsity (Picron and Tuytelaars 2023)."""

from querymask.effseg import checkpoint
from querymask.effseg.config import add_effseg_config
from querymask.effseg.effseg import EffSeg

__all__ = ["EffSeg", "add_effseg_config", "checkpoint"]
