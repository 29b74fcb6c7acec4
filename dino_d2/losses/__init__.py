"""Matching and losses."""

from .criterion import Criterion, Group
from .federated import FederatedClasses
from .focal import quality_focal_loss, sigmoid_focal_loss
from .matcher import HungarianMatcher
from .targets import pack_targets

__all__ = [
    "Criterion",
    "FederatedClasses",
    "Group",
    "HungarianMatcher",
    "pack_targets",
    "quality_focal_loss",
    "sigmoid_focal_loss",
]
