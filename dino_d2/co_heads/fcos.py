"""FCOS (Tian et al., ICCV 2019) as a co-head."""

from collections.abc import Sequence
from functools import partial

from .assign import assign_by_size
from .boxes import Anchors, DistanceCoder
from .dense import DenseHead, Towers

_SCALE = 8  # side of the box that a point hands over, in strides (Co-DETR, table 1)
_RADIUS = 1.5  # of the centre sampling, in strides


class FCOS(DenseHead):
    """Every cell is a point; objects belong to levels by their size."""

    def __init__(
        self, embed_dim: int, num_classes: int, strides: Sequence[int], num_convs: int = 1
    ):
        ranges = [*(8.0 * stride for stride in strides[:-1]), float("inf")]
        super().__init__(
            Towers(embed_dim, num_classes, 1, len(strides), num_convs, centerness=True),
            Anchors(strides, _SCALE),
            DistanceCoder(_SCALE),
            partial(assign_by_size, ranges=ranges, radius=_RADIUS),
            pad_with_outside=False,
        )
