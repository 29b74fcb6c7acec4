"""Safe weight files, and the weights of other repositories."""

from .convert import SOURCES, convert
from .io import CheckpointError, read_weights, write_weights
from .load import load_backbone, load_weights

__all__ = [
    "SOURCES",
    "CheckpointError",
    "convert",
    "load_backbone",
    "load_weights",
    "read_weights",
    "write_weights",
]
