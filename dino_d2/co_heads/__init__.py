"""Auxiliary detection heads for training (Co-DETR)."""

from .atss import ATSS
from .collaboration import CoHeads, Collaboration
from .faster_rcnn import FasterRCNN
from .fcos import FCOS
from .positive_queries import KnownQueries, PositiveQueries
from .protocol import BACKGROUND, IGNORED, Candidates, CoHead, Objects
from .pyramid import MemoryPyramid, adapted_strides
from .retinanet import RetinaNet

# What a config may name; add your own.
CO_HEADS = {
    "atss": ATSS,
    "faster_rcnn": FasterRCNN,
    "fcos": FCOS,
    "retinanet": RetinaNet,
}

__all__ = [
    "ATSS",
    "BACKGROUND",
    "CO_HEADS",
    "FCOS",
    "IGNORED",
    "Candidates",
    "CoHead",
    "CoHeads",
    "Collaboration",
    "FasterRCNN",
    "KnownQueries",
    "MemoryPyramid",
    "Objects",
    "PositiveQueries",
    "RetinaNet",
    "adapted_strides",
]
