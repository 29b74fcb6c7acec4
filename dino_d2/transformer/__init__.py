"""The stages between backbone features and decoder outputs."""

from .decoder import Decoder
from .denoising import ContrastiveDenoising, Denoising
from .encoder import DeformableEncoder
from .neck import Neck
from .query_selection import LearnedQueries, QuerySelection

__all__ = [
    "ContrastiveDenoising",
    "Decoder",
    "DeformableEncoder",
    "Denoising",
    "LearnedQueries",
    "Neck",
    "QuerySelection",
]
