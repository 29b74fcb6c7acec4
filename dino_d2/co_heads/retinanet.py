"""RetinaNet (Lin et al., ICCV 2017) as a co-head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .assign import assign_by_iou
from .boxes import Anchors, DeltaCoder
from .dense import DenseHead, Towers


class RetinaNet(DenseHead):
    """Nine anchors to a cell; positive from an IoU of 0.5 on, negative below 0.4 (Co-DETR,
    table 1).
    """

    nms_threshold = 0.5

    def __init__(
        self, embed_dim: int, num_classes: int, strides: Sequence[int], num_convs: int = 1
    ):
        anchors = Anchors(strides, 4, scales_per_octave=3, ratios=(0.5, 1.0, 2.0))
        super().__init__(
            Towers(
                embed_dim, num_classes, anchors.per_cell, len(strides), num_convs, centerness=False
            ),
            anchors,
            DeltaCoder(),
            _assign,
            pad_with_outside=False,
        )


def _assign(levels: Sequence[Tensor], objects: Tensor) -> Tensor:
    return assign_by_iou(torch.cat(list(levels)), objects, 0.5, 0.4, at_least=0.01)
