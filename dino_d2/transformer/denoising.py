"""Denoising training (DN-DETR, sec. 3; DINO, sec. 3.3): queries made from noised objects.

The decoder sees them in front of the ordinary queries and learns to restore the objects, with no
matching needed. Groups repeat all objects of an image with fresh noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..box_ops import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from ..transfer import to_device
from ..types import Assignment, Queries, Targets


class Noise(NamedTuple):
    """Random draws for B images, R repeats and T slots."""

    replace: Tensor  # (B, R, T) bool: this label is replaced
    labels: Tensor  # (B, R, T) by this class
    direction: Tensor  # (B, R, T, 4) -1 or 1 per coordinate
    amount: Tensor  # (B, R, T, 4) uniform in [0, 1)


class NoisedQueries(NamedTuple):
    """Denoising queries, Q' = R * T of them, and what they stand for."""

    queries: Queries  # content (B, Q', D), anchors (B, Q', 4)
    assignment: Assignment  # N = 1: the positive queries and their objects
    num_groups: int
    hidden: Tensor | None = None  # (B, Q') queries that nobody sees
    ignored: Tensor | None = None  # (B, Q') queries without a loss

    def attn_mask(self, num_queries: int) -> Tensor:
        """(Q' + Q, Q' + Q) for this and `num_queries` ordinary queries behind, or (B, ...) where
        images differ.

        Nobody sees the denoising queries of another group; ordinary queries see none at all.
        """
        total = self.queries.anchors.shape[1]
        position = torch.arange(total + num_queries, device=self.queries.anchors.device)
        group = position // max(total // self.num_groups, 1)
        group = group.where(position < total, -1)
        mask = (group[None] != group[:, None]) & (group[None] >= 0)
        if self.hidden is None:
            return mask
        return mask | functional.pad(self.hidden, (0, num_queries))[:, None]


class Denoising(nn.Module):
    """Denoising queries (DN-DETR): every repeat of the objects is to be restored.

    Args:
        num_classes, embed_dim: K and D.
        num_queries: how many queries to make; the groups share them, so images with many objects
            get few groups, but always one.
        num_groups: or that many groups, however many objects there are. Give one of the two.
        label_noise: probability in [0, 1] that a label is replaced by a random class.
        box_noise: lambda, the noise of the box relative to its size; for DN also a pair, of the
            centre and of the size (lambda1 and lambda2).
        indicator: the last channel of the content is 1, to tell the queries from ordinary ones.
        hide_empty: images with fewer objects than others have empty slots, which the queries of
            their group attend to, as published, so that an image's loss depends on its batch. True
            hides them.
        max_queries: never more queries than this. Where even one group would be larger, a random
            part of the objects is noised.
    """

    repeats_per_group = 1
    takes_pair = True  # as box_noise
    empty_is_background = False  # empty slots have no loss

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        num_queries: int | None = None,
        num_groups: int | None = None,
        label_noise: float = 0.2,
        box_noise: float | Sequence[float] = 0.4,
        max_queries: int = 1000,
        indicator: bool = False,
        hide_empty: bool = False,
    ):
        super().__init__()
        if (num_queries is None) == (num_groups is None):
            raise ValueError("give either num_queries or num_groups")
        if max_queries < self.repeats_per_group:
            raise ValueError(f"max_queries {max_queries} leaves no room for a single object")
        if isinstance(box_noise, Sequence) and not (self.takes_pair and len(box_noise) == 2):
            allowed = "a number or a pair" if self.takes_pair else "a number"
            raise ValueError(f"box_noise of {type(self).__name__} must be {allowed}: {box_noise}")
        self.num_classes = num_classes
        self.num_queries, self.num_groups, self.max_queries = num_queries, num_groups, max_queries
        self.label_noise, self.box_noise = label_noise, box_noise
        self.indicator, self.hide_empty = indicator, hide_empty
        self.label_embed = nn.Embedding(num_classes, embed_dim - int(indicator))

    def forward(self, targets: Targets) -> NoisedQueries:
        """Queries for a batch; none, but still connected to the parameters, without objects."""
        slots, valid = self._fill_slots(targets)
        num_groups = self._count_groups(slots.shape[1])
        repeats = num_groups * self.repeats_per_group
        noise = self.draw(len(slots), repeats, slots.shape[1], targets.boxes)
        return self.make_queries(targets, slots, valid, noise)

    def _fill_slots(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Which object stands in slot t of image b: (B, T) indices, and whether any does."""
        device = targets.labels.device
        most = self.max_queries // self.repeats_per_group
        size = min(max(targets.counts, default=0), most)
        rows, start = [], 0
        for count in targets.counts:
            if count > most:
                row = torch.randperm(count, device=device)[:most]
            else:
                row = torch.arange(size, device=device)
            rows.append(row + start)
            start += count
        counts = to_device(targets.counts, torch.int64, device)
        valid = torch.arange(size, device=device) < counts[:, None]
        return torch.stack(rows).where(valid, 0), valid

    def _count_groups(self, size: int) -> int:
        per_group = max(size, 1) * self.repeats_per_group
        wanted = self.num_groups
        if wanted is None:
            wanted = self.num_queries // per_group if size else 1
        return max(1, min(wanted, self.max_queries // per_group))

    def draw(self, batch: int, repeats: int, size: int, like: Tensor) -> Noise:
        """Fresh noise on the device of `like`, a tensor of boxes."""
        shape = (batch, repeats, size)
        return Noise(
            torch.rand(shape, device=like.device) < self.label_noise,
            torch.randint(self.num_classes, shape, device=like.device),
            torch.randint(2, (*shape, 4), device=like.device).to(like.dtype) * 2 - 1,
            torch.rand(*shape, 4, device=like.device, dtype=like.dtype),
        )

    def make_queries(
        self, targets: Targets, slots: Tensor, valid: Tensor, noise: Noise
    ) -> NoisedQueries:
        """Queries in the order group, repeat, slot. slots, valid: (B, T).

        An empty slot is a query of content 0 and anchor (.5, .5, .5, .5).
        """
        labels = targets.labels[slots][:, None]  # (B, 1, T)
        boxes = targets.boxes[slots][:, None]  # (B, 1, T, 4)
        filled = valid[:, None, :, None]
        content = self.label_embed(noise.labels.where(noise.replace, labels))
        if self.indicator:
            content = functional.pad(content, (0, 1), value=1.0)
        content = content * filled
        anchors = inverse_sigmoid(self.noise_boxes(boxes, noise)).sigmoid()
        anchors = anchors.where(filled, 0.5)
        queries = Queries(content.flatten(1, 2), anchors.flatten(1, 2))
        repeats = noise.replace.shape[1]
        num_groups = repeats // self.repeats_per_group
        empty = (~valid).repeat(1, repeats)  # (B, Q')
        return NoisedQueries(
            queries,
            self._assign(targets, slots, num_groups),
            num_groups,
            hidden=empty if self.hide_empty else None,
            ignored=None if self.empty_is_background else empty,
        )

    def _assign(self, targets: Targets, slots: Tensor, num_groups: int) -> Assignment:
        """The first repeat of every group is positive; its slot t stands for the image's object t.

        Built from numbers the host knows, so that nothing waits for the device.
        """
        device, size = slots.device, slots.shape[1]
        image, slot = [], []
        for index, count in enumerate(targets.counts):
            image += [index] * min(count, size)
            slot += range(min(count, size))
        image, slot = to_device([image, slot], torch.int64, device)
        target = slots[image, slot]
        first = torch.arange(num_groups, device=device)[:, None] * size * self.repeats_per_group
        query = (first + slot).flatten()
        return Assignment(image.repeat(num_groups), query[None], target.repeat(num_groups)[None])

    def noise_boxes(self, boxes: Tensor, noise: Noise) -> Tensor:
        """Shift the centre within the box and scale the sides (DN-DETR, sec. 3.3).

        boxes: (B, 1, T, 4) cxcywh; returns (B, R, T, 4) within [0, 1].
        """
        both = isinstance(self.box_noise, Sequence)
        centre_noise, size_noise = self.box_noise if both else [self.box_noise] * 2
        sizes = boxes[..., 2:]
        reach = torch.cat([centre_noise * sizes / 2, size_noise * sizes], -1)
        return (boxes + noise.direction * noise.amount * reach).clamp(0, 1)


class ContrastiveDenoising(Denoising):
    """Contrastive denoising (DINO, sec. 3.3): each group also holds negatives, which are to be
    rejected, because their noise is larger than that of any positive.

    The label noise is a probability; the official setting `dn_label_noise_ratio=0.5` is 0.25 here.
    The official `dn_number=100` is `num_queries=200`; below 50, it is `num_groups=2 * dn_number`.
    """

    repeats_per_group = 2
    takes_pair = False
    empty_is_background = True

    def noise_boxes(self, boxes: Tensor, noise: Noise) -> Tensor:
        """Move each corner coordinate by up to half the side, or half to a whole for negatives.

        Corners of negatives may cross and give a negative size, as published; the anchor is then
        the smallest that its logit allows.
        """
        half = boxes[..., 2:] / 2
        reach = torch.cat([half, half], -1) * self.box_noise
        is_negative = torch.arange(noise.amount.shape[1], device=boxes.device) % 2
        amount = noise.amount + is_negative[:, None, None]
        corners = cxcywh_to_xyxy(boxes) + noise.direction * amount * reach
        return xyxy_to_cxcywh(corners.clamp(0, 1))
