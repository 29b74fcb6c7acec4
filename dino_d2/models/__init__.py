"""Detectors, assembled from the parts."""

from .detr import DETR
from .dino import build_dino

__all__ = ["DETR", "build_dino"]
