"""Building blocks that every transformer here shares."""

from .attention import DeformableAttention, attend
from .init import init_transformer, repeat
from .mlp import MLP, FeedForward
from .position_encoding import SinePositionEncoding, encode_boxes

__all__ = [
    "MLP",
    "DeformableAttention",
    "FeedForward",
    "SinePositionEncoding",
    "attend",
    "encode_boxes",
    "init_transformer",
    "repeat",
]
