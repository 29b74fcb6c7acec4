"""ATSS (Zhang et al., CVPR 2020) as a co-head."""

from collections.abc import Sequence
from functools import partial

from .assign import assign_adaptively
from .boxes import Anchors, DeltaCoder
from .dense import DenseHead, Towers

_SCALE = 8  # side of an anchor, in strides


class ATSS(DenseHead):
    """One square anchor to a cell; the nearest few of every level are candidates of an object."""

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        strides: Sequence[int],
        num_convs: int = 1,
        topk: int = 9,
        pad_with_outside: bool = True,
    ):
        super().__init__(
            Towers(embed_dim, num_classes, 1, len(strides), num_convs, centerness=True),
            Anchors(strides, _SCALE),
            DeltaCoder((0.1, 0.1, 0.2, 0.2)),
            partial(assign_adaptively, topk=topk),
            pad_with_outside,
        )
