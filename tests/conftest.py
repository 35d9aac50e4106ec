"""Importing the package first lets every test import Detectron2, whatever version is installed."""

import querymask  # noqa: F401
