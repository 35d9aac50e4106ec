"""From the config to a segmentation head."""

from detectron2.config import CfgNode

from querymask.effseg.heads.effseg import EffSegHead
from querymask.effseg.heads.mask_rcnn import MaskRCNNHead
from querymask.effseg.heads.pointrend import PointRendHead
from querymask.effseg.heads.refine_mask import RefineMaskHead
from querymask.effseg.regions import SegmentationHead


def build_mask_head(name: str, effseg: CfgNode, width: int, num_classes: int) -> SegmentationHead:
    """A head of ``MODEL.EFFSEG``.

    Args:
        name: "effseg", "mask_rcnn", "pointrend" or "refine_mask".
        effseg: the section.
        width: C of maps and queries.
        num_classes: K.
    """
    if name == "effseg":
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
        return MaskRCNNHead(width, num_classes)
    if name == "pointrend":
        return PointRendHead(width, num_classes, subdivisions=effseg.POINT_SUBDIVISIONS)
    assert name == "refine_mask", name
    return RefineMaskHead(width, num_classes)
