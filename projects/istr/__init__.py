"""ISTR: end-to-end instance segmentation with transformers (Hu et al. 2021)."""

from querymask.istr import checkpoint
from querymask.istr.config import add_istr_config
from querymask.istr.istr import ISTR
from querymask.istr.pixels import PixelBranch

__all__ = ["ISTR", "PixelBranch", "add_istr_config", "checkpoint"]
