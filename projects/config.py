"""One config with the keys of all methods."""

from detectron2.config import CfgNode

from querymask.common.compat import detectron2_cfg
from querymask.common.config import add_common_config
from querymask.effseg.config import add_effseg_config
from querymask.isda.config import add_isda_config
from querymask.istr.config import add_istr_config
from querymask.solq.config import add_solq_config


def add_querymask_config(cfg: CfgNode) -> None:
    """Add the keys of every QueryMask method to a Detectron2 config, in place."""
    add_common_config(cfg)
    add_solq_config(cfg)
    add_isda_config(cfg)
    add_istr_config(cfg)
    add_effseg_config(cfg)


def get_cfg() -> CfgNode:
    """Detectron2's default config with the keys of every QueryMask method."""
    cfg = detectron2_cfg()
    add_querymask_config(cfg)
    return cfg
