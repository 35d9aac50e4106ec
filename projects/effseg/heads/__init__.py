"""Segmentation heads on the queries of FQDet."""

from querymask.effseg.heads.build import build_mask_head

__all__ = ["build_mask_head"]
