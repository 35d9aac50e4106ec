"""Backbones that Detectron2 lacks, and the projections from backbone features to transformer levels."""
