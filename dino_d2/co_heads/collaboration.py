"""All co-heads of a detector, and what they hand to its decoder (Co-DETR, fig. 4)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..box_ops import cxcywh_to_xyxy
from ..transfer import to_device
from ..types import Detections, Memory, Targets
from .positive_queries import KnownQueries, PositiveQueries
from .protocol import CoHead, Objects
from .pyramid import MemoryPyramid


class Collaboration(NamedTuple):
    """What the co-heads give to a training step."""

    losses: dict[str, Tensor]  # weighted scalars by name: loss_{kind}_{head}
    queries: dict[str, KnownQueries]  # of every head


class CoHeads(nn.Module):
    """Auxiliary heads on the encoder's memory, for training.

    Args:
        pyramid: makes the heads' maps from the memory.
        heads: by the names that their losses have.
        queries: what turns each head's candidates into queries.
        weights: of each head's losses.
        query_weight: of the losses of their queries (lambda 1).
        one_pass: decode the queries of all heads along with the ordinary ones, in one masked pass,
            instead of a pass for each head. The results are the same.
    """

    def __init__(
        self,
        pyramid: MemoryPyramid,
        heads: Mapping[str, CoHead],
        queries: Mapping[str, PositiveQueries],
        weights: Mapping[str, float],
        query_weight: float,
        one_pass: bool,
    ):
        super().__init__()
        self.pyramid = pyramid
        self.heads = nn.ModuleDict(heads)
        self.queries = nn.ModuleDict(queries)
        self.weights = dict(weights)
        self.query_weight = query_weight
        self.one_pass = one_pass

    def forward(self, memory: Memory, padding_mask: Tensor, targets: Targets) -> Collaboration:
        """padding_mask: (B, H, W) of the images."""
        maps, sizes = self.pyramid(memory), image_sizes(padding_mask)
        objects = in_pixels(targets, sizes)
        losses, queries = {}, {}
        for name, head in self.heads.items():
            of_head, candidates = head(maps, sizes, objects)
            for kind, loss in of_head.items():
                losses[f"loss_{kind}_{name}"] = self.weights[name] * loss
            queries[name] = self.queries[name](candidates, targets, sizes)
        return Collaboration(losses, queries)

    def detect(self, name: str, memory: Memory, padding_mask: Tensor) -> list[Detections]:
        """One head's own detections, in pixels of the images; see `CoHead.detect`.

        Raises:
            ValueError: there is no such head.
        """
        if name not in self.heads:
            raise ValueError(f"no co-head {name!r}; there are {list(self.heads)}")
        return self.heads[name].detect(self.pyramid(memory), image_sizes(padding_mask))


def image_sizes(padding_mask: Tensor) -> list[tuple[int, int]]:
    """(B, H, W) -> width and height of every image; waits for the device."""
    valid = ~padding_mask
    sizes = torch.stack([valid[:, 0].sum(1), valid[:, :, 0].sum(1)], 1)
    return [(width, height) for width, height in sizes.tolist()]


def in_pixels(targets: Targets, sizes: Sequence[tuple[int, int]]) -> list[Objects]:
    """The objects of every image, their boxes as corners in pixels."""
    return [
        Objects(labels, cxcywh_to_xyxy(boxes) * to_device(size * 2, boxes.dtype, boxes.device))
        for labels, boxes, size in zip(
            targets.labels.split(targets.counts),
            targets.boxes.split(targets.counts),
            sizes,
            strict=True,
        )
    ]
