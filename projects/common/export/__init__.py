"""Models as one file that needs nothing of this project: ONNX, or a program of ``torch.export``."""

from querymask.common.export.files import ENDINGS, Description, is_exported, write
from querymask.common.export.model import ExportedModel
from querymask.common.export.network import ExportNetwork, export_program

__all__ = ["ENDINGS", "Description", "ExportNetwork", "ExportedModel", "export_program", "is_exported", "write"]
