"""Decoder queries made of the boxes that co-heads were trained on (Co-DETR, sec. 3.3)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..box_ops import xyxy_to_cxcywh
from ..layers import encode_boxes
from ..transfer import to_device
from ..types import Assignment, Queries, Targets
from .assign import random_subset
from .protocol import BACKGROUND, Candidates


class KnownQueries(NamedTuple):
    """Queries whose objects are known, so that nothing has to be matched."""

    queries: Queries  # Q' of every image
    assignment: Assignment  # N = 1
    padding: Tensor | None  # (B, Q') True: stands for nothing, and has no loss

    def attn_mask(self) -> Tensor | None:
        """(B, Q', Q'): nobody sees padding, but for itself; None without any."""
        if self.padding is None:
            return None
        itself = torch.eye(self.padding.shape[1], dtype=torch.bool, device=self.padding.device)
        return self.padding[:, None] & ~itself


class PositiveQueries(nn.Module):
    """Turns one head's candidates into queries.

    Every image gets as many queries as the one with the most positives has, but within limits.
    Where there are more positives, a random part is taken. Where there are fewer, random negatives
    of the same image fill the places and are trained as background.

    Args:
        given_positions: whether the decoder takes positions with its queries (Deformable DETR);
            DINO makes them of the anchors.
        use_features: add the head's features to the content; in Co-DETR, only where positions are
            given.
        fewest, most: limits of the number of queries.
        pad_with_negatives: False leaves the places empty instead, unseen and without a loss. The
            paper speaks of positive queries only; the published weights were trained with
            negatives.
        embed_per_channel: the embedding of the head, which is added to given positions, has D
            numbers, as meant; otherwise one for all channels, as published weights have.
    """

    def __init__(
        self,
        embed_dim: int,
        given_positions: bool,
        use_features: bool,
        fewest: int = 9,
        most: int = 300,
        pad_with_negatives: bool = True,
        embed_per_channel: bool = False,
    ):
        super().__init__()
        self.fewest, self.most, self.pad_with_negatives = fewest, most, pad_with_negatives
        self.given_positions = given_positions
        dim = embed_dim * (2 if given_positions else 1)
        self.from_box = nn.Linear(2 * embed_dim, dim)
        self.from_box_norm = nn.LayerNorm(dim)
        self.from_feature = nn.Linear(embed_dim, embed_dim) if use_features else None
        self.from_feature_norm = nn.LayerNorm(embed_dim) if use_features else None
        self.head_embed = None
        if given_positions:
            self.head_embed = nn.Parameter(torch.randn(embed_dim if embed_per_channel else 1))

    def forward(
        self,
        candidates: Sequence[Candidates],
        targets: Targets,
        image_sizes: Sequence[tuple[int, int]],
    ) -> KnownQueries:
        """Queries for a batch.

        Raises:
            ValueError: features are used, but the head gives none.
        """
        positives = [(c.matched >= 0).nonzero().squeeze(1) for c in candidates]
        count = min(self.most, max(map(len, positives)))
        count = max(self.fewest, count)
        positives = [random_subset(p, count) for p in positives]
        chosen, padding = self._fill(candidates, positives, count)
        anchors = torch.stack(
            [
                xyxy_to_cxcywh(c.boxes[index] / to_device(size * 2, c.boxes.dtype, index.device))
                for c, index, size in zip(candidates, chosen, image_sizes, strict=True)
            ]
        )
        if padding is not None:
            anchors = anchors.masked_fill(padding[..., None], 0)
        features = None
        if self.from_feature is not None:
            features = torch.stack(list(map(_features, candidates, chosen)))
        assignment = _assign(candidates, positives, targets)
        return KnownQueries(self.encode(anchors, features), assignment, padding)

    def _fill(
        self, candidates: Sequence[Candidates], positives: Sequence[Tensor], count: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """(Q',) indices of candidates for every image, and which of them (B, Q') are padding."""
        chosen, missing = [], []
        for of_image, kept in zip(candidates, positives, strict=True):
            free = count - len(kept)
            negatives = kept[:0]
            if self.pad_with_negatives and free:
                negatives = (of_image.matched == BACKGROUND).nonzero().squeeze(1)
                negatives = random_subset(negatives, free)
            missing.append(free - len(negatives))
            chosen.append(torch.cat([kept, negatives, kept.new_zeros(missing[-1])]))
        if not any(missing):
            return chosen, None
        position = torch.arange(count, device=chosen[0].device)
        return chosen, torch.stack([position >= count - lacking for lacking in missing])

    def encode(self, anchors: Tensor, features: Tensor | None) -> Queries:
        """Linear(PE(boxes)) [+ Linear(features)] (Co-DETR, eq. 4), each with a LayerNorm.

        anchors: (B, Q', 4) cxcywh in [0, 1]; features: (B, Q', D).
        """
        dim = self.from_box.in_features // 4
        encoded = encode_boxes(anchors.clamp(1e-5, 1 - 1e-5), dim, order=(0, 1, 2, 3))
        content = self.from_box_norm(self.from_box(encoded))
        positions = None
        if self.given_positions:
            positions, content = content.chunk(2, -1)
            positions = positions + self.head_embed
        if features is not None:
            content = content + self.from_feature_norm(self.from_feature(features))
        return Queries(content, anchors, positions)


def _features(candidates: Candidates, chosen: Tensor) -> Tensor:
    if candidates.features is None:
        raise ValueError("a co-head without features cannot give content to queries: use_features")
    share = len(candidates.boxes) // len(candidates.features)
    return candidates.features[chosen // share]


def _assign(
    candidates: Sequence[Candidates], positives: Sequence[Tensor], targets: Targets
) -> Assignment:
    """The first queries of every image are its positives."""
    image, query, target, start = [], [], [], 0
    for number, (of_image, kept) in enumerate(zip(candidates, positives, strict=True)):
        image.append(torch.full_like(kept, number))
        query.append(torch.arange(len(kept), device=kept.device))
        target.append(of_image.matched[kept] + start)
        start += targets.counts[number]
    return Assignment(torch.cat(image), torch.cat(query)[None], torch.cat(target)[None])
