"""EffSeg: fine-grained instance segmentation on structure-preserving sparsity (Picron and Tuytelaars 2023).

So far its detectors FQDet and FQDetV2 as modules on a feature pyramid, equal to the release; no meta-architecture yet.
"""
