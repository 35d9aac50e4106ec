"""FQDet, EffSeg's detector (Picron et al., https://arxiv.org/abs/2210.02318)."""

from querymask.effseg.fqdet.detector import FQDet

__all__ = ["FQDet"]
