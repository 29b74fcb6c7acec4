"""Matching and losses."""

from .criterion import Criterion, Group
from .focal import sigmoid_focal_loss
from .matcher import HungarianMatcher
from .targets import pack_targets

__all__ = ["Criterion", "Group", "HungarianMatcher", "pack_targets", "sigmoid_focal_loss"]
