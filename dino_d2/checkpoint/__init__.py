"""Safe weight files, and the weights of other repositories."""

from .classes import ClassNames, map_classes
from .convert import SOURCES, convert
from .io import CheckpointError, read_weights, write_weights
from .load import load_backbone, load_weights

__all__ = [
    "SOURCES",
    "CheckpointError",
    "ClassNames",
    "convert",
    "load_backbone",
    "load_weights",
    "map_classes",
    "read_weights",
    "write_weights",
]
