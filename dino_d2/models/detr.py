"""The frame that all detectors of the family share."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from ..losses import Criterion, Group, HungarianMatcher, pack_targets
from ..transformer.denoising import NoisedQueries
from ..types import Assignment, Predictions, Queries, Target, Targets


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
        self.num_classes = heads.num_classes

    def forward(
        self, images: Tensor, padding_mask: Tensor, targets: Sequence[Target] | None = None
    ) -> Predictions | dict[str, Tensor]:
        """Predictions, or with targets the losses.

        Args:
            images: (B, 3, H, W), normalised.
            padding_mask: (B, H, W), True on padding.
            targets: one per image, on the CPU. Denoising takes part in training mode only.

        Returns:
            Predictions of every decoder layer, or weighted scalar losses by name.

        Raises:
            TargetError, NonFiniteError: see `pack_targets` and `HungarianMatcher`.
        """
        pyramid = self.neck(self.backbone(images), padding_mask)
        memory = self.encoder(pyramid)
        queries, proposals = self.query_source(memory)
        if targets is None:
            return self.decoder(queries, memory, self.heads)
        if len(targets) != len(images):
            raise ValueError(f"targets of {len(targets)} images for a batch of {len(images)}")
        packed = pack_targets(targets, self.num_classes, images)
        noised = None
        attn_mask = None
        if self.training and self.denoising is not None:
            noised = self.denoising(packed)
            attn_mask = noised.attn_mask(queries.anchors.shape[1])
            queries = Queries(*map(_prepend, noised.queries[:2], queries[:2]))
        predictions = self.decoder(queries, memory, self.heads, attn_mask)
        return self._losses(predictions, proposals, noised, packed)

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
    ) -> dict[str, Tensor]:
        """Make a group of everything supervised and hand all to the criterion."""
        with torch.autocast(targets.boxes.device.type, enabled=False):
            num_noised = 0 if noised is None else noised.queries.anchors.shape[1]
            denoised = predictions.queries(0, num_noised)
            matched = {"decoder": (predictions.queries(num_noised), targets)}
            if proposals is not None:
                known = targets
                if self.query_source.class_agnostic:
                    known = targets._replace(labels=torch.zeros_like(targets.labels))
                matched["encoder proposals"] = (proposals, known)
            assignments = self.matcher(matched, {"denoising": denoised})
            num_objects = average_count(targets)
            groups = [
                Group("" if name == "decoder" else "enc", *group, assignments[name], num_objects)
                for name, group in matched.items()
            ]
            if noised is not None:
                normalizer = num_objects * noised.num_groups
                dn = Group("dn", denoised, targets, noised.assignment, normalizer)
                groups.append(dn._replace(ignored=noised.ignored))
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


def average_count(targets: Targets) -> Tensor | float:
    """Objects per process, averaged over the processes, at least 1: what losses are divided by.

    Without distributed training it is known to the host; otherwise it stays on the device.
    """
    count = len(targets.labels)
    if not (distributed.is_available() and distributed.is_initialized()):
        return float(max(count, 1))
    total = torch.full((), count, dtype=targets.boxes.dtype, device=targets.boxes.device)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).clamp(min=1)
