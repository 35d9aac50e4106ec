"""SOLQ: segmenting objects by learning queries (Dong et al., NeurIPS 2021)."""
