"""Segmentation heads of FQDet: EffSeg's own refinement head, and the heads that it is compared with."""
