"""SOLQ: segmenting objects by learning queries (Dong et al., NeurIPS 2021)."""

from querymask.solq import checkpoint
from querymask.solq.config import add_solq_config
from querymask.solq.solq import SOLQ
from querymask.solq.sqr import SQRBranch

__all__ = ["SOLQ", "SQRBranch", "add_solq_config", "checkpoint"]
