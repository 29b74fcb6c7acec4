"""What a co-head takes and what it gives (Co-DETR, sec. 3.2)."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..transfer import to_device
from ..types import Detections

BACKGROUND = -1  # stands for no object
IGNORED = -2  # without a loss


class Objects(NamedTuple):
    """The objects of one image, for the co-heads."""

    labels: Tensor  # (T,) int64 in [0, K)
    boxes: Tensor  # (T, 4) corners in pixels


class Candidates(NamedTuple):
    """The boxes of one image that a co-head was trained on; positive queries are made of them."""

    boxes: Tensor  # (A, 4) corners in pixels
    matched: Tensor  # (A,) int64 index of the image's object, BACKGROUND or IGNORED
    features: Tensor | None  # (A / n, D), each of n boxes in a row; None if the head gives none


def wanted_of(objects: Sequence[Objects], image: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (P,) and boxes (P, 4) of the objects `matched` (P,), counted in their `image` (P,)."""
    starts = [0, *accumulate(len(of_image.labels) for of_image in objects)][:-1]
    row = to_device(starts, torch.int64, image.device)[image] + matched
    labels, boxes = (torch.cat(parts) for parts in zip(*objects, strict=True))
    return labels[row], boxes[row]


class CoHead(Protocol):
    """An auxiliary detection head on the maps of the encoder's memory.

    It is built by `(embed_dim, num_classes, strides)` and its own options, `strides` being those of
    its maps in pixels. Register it in `CO_HEADS` to name it in a config.
    """

    def __call__(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
    ) -> tuple[dict[str, Tensor], list[Candidates]]:
        """Train on a batch.

        Args:
            maps: (B, D, h, w) each, finest first.
            image_sizes: width and height of every image in pixels, without padding.
            objects: of every image.

        Returns:
            scalar losses by kind, and the candidates of every image.
        """

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """The head's own detections: for every image scores (k,), labels (k,), boxes (k, 4)."""
