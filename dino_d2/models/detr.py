"""The frame that all detectors of the family share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..co_heads import CoHeads, Collaboration
from ..losses import Criterion, Group, HungarianMatcher, pack_targets
from ..processes import average_count
from ..transformer.decoder import decode_apart
from ..transformer.denoising import NoisedQueries
from ..types import Assignment, Detections, Memory, Predictions, Queries, Target, Targets


class DETR(nn.Module):
    """Backbone, neck, encoder, queries, decoder; losses in training.

    Detectors differ in what they put into these places, not in this class. See
    `models/dino.py: build_dino` for an assembly.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        encoder: nn.Module,
        query_source: nn.Module,
        decoder: nn.Module,
        heads: nn.Module,
        denoising: nn.Module | None,
        matcher: HungarianMatcher,
        criterion: Criterion,
        co_heads: CoHeads | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.query_source = query_source
        self.decoder = decoder
        self.heads = heads
        self.denoising = denoising
        self.matcher = matcher
        self.criterion = criterion
        self.co_heads = co_heads
        self.num_classes = heads.num_classes

    def forward(
        self, images: Tensor, padding_mask: Tensor, targets: Sequence[Target] | None = None
    ) -> Predictions | dict[str, Tensor]:
        """Predictions, or with targets the losses.

        Args:
            images: (B, 3, H, W), normalised.
            padding_mask: (B, H, W), True on padding.
            targets: one per image, on the CPU. Denoising and co-heads take part in training mode
                only.

        Returns:
            Predictions of every decoder layer, or weighted scalar losses by name.

        Raises:
            TargetError, NonFiniteError: see `pack_targets` and `HungarianMatcher`.
        """
        memory = self._encode(images, padding_mask)
        queries, proposals = self.query_source(memory)
        if targets is None:
            return self.decoder(queries, memory, self.heads)
        if len(targets) != len(images):
            raise ValueError(f"targets of {len(targets)} images for a batch of {len(images)}")
        if not queries.content.shape[1]:
            raise ValueError("there are no queries to train: num_queries must be positive")
        packed = pack_targets(targets, self.num_classes, images)
        noised, helped = None, Collaboration({}, {})
        if self.training and self.denoising is not None:
            noised = self.denoising(packed)
        if self.training and self.co_heads is not None:
            helped = self.co_heads(memory, padding_mask, packed)
        predictions, *of_heads = self._decode(queries, noised, helped, memory)
        losses = self._losses(predictions, proposals, noised, packed, helped, of_heads)
        return {**losses, **helped.losses}

    def _decode(
        self,
        queries: Queries,
        noised: NoisedQueries | None,
        helped: Collaboration,
        memory: Memory,
    ) -> list[Predictions]:
        """Of the denoising and ordinary queries together, and of every co-head's queries."""
        attn_mask = None
        if noised is not None:
            attn_mask = noised.attn_mask(queries.anchors.shape[1])
            queries = Queries(*map(_prepend, noised.queries[:2], queries[:2]))
        parts = [(queries, attn_mask)]
        parts += [(known.queries, known.attn_mask()) for known in helped.queries.values()]
        if helped.queries and self.co_heads.one_pass:
            return decode_apart(self.decoder, parts, memory, self.heads)
        return [self.decoder(part, memory, self.heads, mask) for part, mask in parts]

    def _encode(self, images: Tensor, padding_mask: Tensor) -> Memory:
        return self.encoder(self.neck(self.backbone(images), padding_mask))

    def detect_by(self, head: str, images: Tensor, padding_mask: Tensor) -> list[Detections]:
        """The own detections of a co-head, for every image: scores (k,), labels (k,) and boxes
        (k, 4) in pixels. Arguments are those of `forward`.

        Raises:
            ValueError: there is no such head.
        """
        if self.co_heads is None:
            raise ValueError(f"no co-head {head!r}: this detector has none")
        return self.co_heads.detect(head, self._encode(images, padding_mask), padding_mask)

    @torch.no_grad()
    def match(
        self, images: Tensor, padding_mask: Tensor, targets: Sequence[Target]
    ) -> tuple[Assignment, int]:
        """How the decoder's predictions match the objects, and the number of queries.

        Arguments are those of `forward`.
        """
        packed = pack_targets(targets, self.num_classes, images)
        predictions = self(images, padding_mask)
        assignment = self.matcher({"decoder": (predictions, packed)})["decoder"]
        return assignment, predictions.boxes.shape[2]

    def _losses(
        self,
        predictions: Predictions,
        proposals: Predictions | None,
        noised: NoisedQueries | None,
        targets: Targets,
        helped: Collaboration,
        of_heads: Sequence[Predictions],
    ) -> dict[str, Tensor]:
        """Make a group of everything supervised and hand all to the criterion."""
        with torch.autocast(targets.boxes.device.type, enabled=False):
            # before the matcher, which may raise in one process: all have to call them
            num_objects = average_count(len(targets.labels), targets.boxes)
            counts = {name: len(known.assignment.image) for name, known in helped.queries.items()}
            normalizers = {name: average_count(n, targets.boxes) for name, n in counts.items()}
            num_noised = 0 if noised is None else noised.queries.anchors.shape[1]
            denoised = predictions.queries(0, num_noised)
            matched = {"decoder": (predictions.queries(num_noised), targets)}
            if proposals is not None:
                known = targets
                if self.query_source.class_agnostic:
                    known = targets._replace(labels=torch.zeros_like(targets.labels))
                matched["encoder proposals"] = (proposals, known)
            helpers = dict(zip(helped.queries, of_heads, strict=True))
            assignments = self.matcher(matched, {"denoising": denoised, **helpers})
            groups = [
                Group("" if name == "decoder" else "enc", *group, assignments[name], num_objects)
                for name, group in matched.items()
            ]
            if noised is not None:
                normalizer = num_objects * noised.num_groups
                dn = Group("dn", denoised, targets, noised.assignment, normalizer)
                groups.append(dn._replace(ignored=noised.ignored))
            for name, of_head in helpers.items():
                known = helped.queries[name]
                scale = normalizers[name]
                group = Group(f"{name}_queries", of_head, targets, known.assignment, scale)
                weight = self.co_heads.query_weight
                groups.append(group._replace(ignored=known.padding, weight=weight))
            return self.criterion(groups)


def feature_channels(backbone: nn.Module, in_features: Sequence[str]) -> list[int]:
    """Channels of the named feature maps of a backbone.

    Raises:
        ValueError: the backbone has no such map; the message lists those it has.
    """
    shapes = backbone.output_shape()
    missing = [name for name in in_features if name not in shapes]
    if missing:
        raise ValueError(
            f"the backbone has no feature maps {missing}, only {list(shapes)}; set in_features, or "
            "the backbone's outputs"
        )
    return [shapes[name].channels for name in in_features]


def _prepend(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first.to(second.dtype), second], 1)
