"""The stages between backbone features and decoder outputs."""

from .conditional import ConditionalPositions, conditional_layers
from .decoder import BoxPositions, Decoder, DeformableDecoderLayer, GivenPositions
from .denoising import ContrastiveDenoising, Denoising
from .encoder import DeformableEncoder, DenseEncoder
from .neck import Neck
from .query_selection import (
    LearnedQueries,
    QuerySelection,
    ReferencePointQueries,
    TwoStageQueries,
)

__all__ = [
    "BoxPositions",
    "ConditionalPositions",
    "ContrastiveDenoising",
    "Decoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "Denoising",
    "DenseEncoder",
    "GivenPositions",
    "LearnedQueries",
    "Neck",
    "QuerySelection",
    "ReferencePointQueries",
    "TwoStageQueries",
    "conditional_layers",
]
