"""The hand-overs between the stages of a detector.

Dimension letters everywhere: B images, L levels, S tokens over all levels, D channels, Q queries,
N decoder layers, K classes, T objects of one image, M matched pairs.

Boxes are (centre x, centre y, width, height) relative to the image without its padding, unless a
name says otherwise. `padding_mask` is True on padding, `attn_mask` is True where attention is
blocked.
"""

from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """The objects of one image."""

    labels: Tensor  # (T,) int64 in [0, K)
    boxes: Tensor  # (T, 4) cxcywh in [0, 1]


class Targets(NamedTuple):
    """The objects of a batch, one image after the other."""

    labels: Tensor  # (sum T,)
    boxes: Tensor  # (sum T, 4)
    counts: tuple[int, ...]  # T of every image, known to the host


class FeaturePyramid(NamedTuple):
    """Feature maps of every level, finest first."""

    maps: tuple[Tensor, ...]  # L x (B, D, h, w)
    padding_masks: tuple[Tensor, ...]  # L x (B, h, w)
    positions: tuple[Tensor, ...]  # L x (B, D, h, w)


class Memory(NamedTuple):
    """The encoder's output: the tokens of all levels in one sequence."""

    tokens: Tensor  # (B, S, D)
    positions: Tensor  # (B, S, D) their encodings
    padding_mask: Tensor  # (B, S)
    spatial_shapes: tuple[tuple[int, int], ...]  # L x (h, w), known to the host
    level_sizes: Tensor  # (L, 2) the same as (width, height) on the device, in float
    valid_ratios: Tensor  # (B, L, 2) share of the map's (width, height) that is image


class Queries(NamedTuple):
    """What the decoder starts from."""

    content: Tensor  # (B, Q, D)
    anchors: Tensor  # (B, Q, 4) cxcywh in [0, 1], or (B, Q, 2) reference points
    positions: Tensor | None = None  # (B, Q, D) where they do not follow from the anchors


class Predictions(NamedTuple):
    """Class scores and boxes of every query after every layer."""

    logits: Tensor  # (N, B, Q, K), before the sigmoid
    boxes: Tensor  # (N, B, Q, 4) cxcywh in [0, 1]

    def queries(self, start: int, stop: int | None = None) -> "Predictions":
        """Those of the queries [start, stop)."""
        return Predictions(self.logits[:, :, start:stop], self.boxes[:, :, start:stop])


class Assignment(NamedTuple):
    """Which query answers for which object: M pairs in each of N layers, as int64 indices."""

    image: Tensor  # (M,) the same in every layer
    query: Tensor  # (N, M)
    target: Tensor  # (N, M) into Targets


class Detections(NamedTuple):
    """The k best detections of every image, best first."""

    scores: Tensor  # (B, k) in [0, 1]
    labels: Tensor  # (B, k)
    boxes: Tensor  # (B, k, 4) corners x0, y0, x1, y1 in pixels
