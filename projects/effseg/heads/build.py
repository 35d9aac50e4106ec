"""From the config to a segmentation head."""

from detectron2.config import CfgNode

from querymask.effseg.regions import SegmentationHead

MASK_HEADS = ("none", "effseg", "mask_rcnn", "pointrend", "refine_mask")


def build_mask_head(effseg: CfgNode) -> SegmentationHead | None:
    """The head that ``MODEL.EFFSEG`` describes; None for the detector alone.

    Raises:
        ValueError: there is no such head.
    """
    name, width, num_classes = effseg.MASK_HEAD, effseg.HIDDEN_DIM, effseg.NUM_CLASSES
    if name == "none":
        return None
    if name == "effseg":
        from querymask.effseg.heads.effseg import EffSegHead

        return EffSegHead(
            width,
            processing=effseg.PROCESSING,
            refinements=effseg.REFINEMENTS,
            num_fcn_convs=effseg.NUM_FCN_CONVS,
            dilations=tuple(effseg.DILATIONS),
            seg_weights=tuple(effseg.SEG_WEIGHTS),
            ref_weights=tuple(effseg.REF_WEIGHTS),
            use_position=effseg.USE_POSITION,
        )
    if name == "mask_rcnn":
        from querymask.effseg.heads.mask_rcnn import MaskRCNNHead

        return MaskRCNNHead(width, num_classes)
    if name == "pointrend":
        from querymask.effseg.heads.pointrend import PointRendHead

        return PointRendHead(width, num_classes, subdivisions=effseg.POINT_SUBDIVISIONS)
    if name == "refine_mask":
        from querymask.effseg.heads.refine_mask import RefineMaskHead

        return RefineMaskHead(width, num_classes)
    raise ValueError(f"MODEL.EFFSEG.MASK_HEAD is {name!r}: choose one of {', '.join(MASK_HEADS)}")
