"""Where positive queries start from (Co-DETR, sec. 4.4, fig. 7)."""

from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..models import DETR
from ..types import Memory, Targets


@torch.no_grad()
def matched_anchors(detector: DETR, memory: Memory, targets: Targets) -> list[Tensor]:
    """The anchors of the queries that the last decoder layer matches to an image's objects.

    Returns:
        (T, 4) cxcywh for every image, or (T, 2) where anchors are points; in no certain order.
    """
    queries, _ = detector.query_source(memory)
    predictions = detector.decoder(queries, memory, detector.heads)
    assignment = detector.matcher({"decoder": (predictions, targets)})["decoder"]
    matched = queries.anchors[assignment.image, assignment.query[-1]]
    return [matched[assignment.image == image] for image in range(len(targets.counts))]


def distances_to_nearest(customised: Tensor, original: Tensor) -> Tensor:
    """(T',): how far the centre of each box (T', 4) is from the nearest of others' (T, 2 or 4).

    In units of the image's sides; infinite where there are no others.
    """
    if not len(original):
        return torch.full((len(customised),), torch.inf)
    return torch.cdist(customised[:, :2], original[:, :2]).amin(1)


def plot_query_positions(
    queries: Mapping[str, Sequence[Tensor]], original: str, out: str | PathLike
) -> None:
    """Draw centres of positive queries of all images, and their distances from the original ones.

    Args:
        queries: by origin, boxes (T, 4) cxcywh of every image, or points (T, 2).
        original: the name of those that the others are compared with.
        out: file to write.
    """
    compared = {name: boxes for name, boxes in queries.items() if name != original}
    figure = Figure(figsize=(10 if compared else 5, 5))
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    for name, of_images in queries.items():
        centres = torch.cat([boxes[:, :2] for boxes in of_images]).cpu()
        axes[0].scatter(*centres.T, s=6, alpha=0.6, label=f"{name} ({len(centres)})")
    axes[0].set(xlim=(0, 1), ylim=(1, 0), aspect="equal", title="centres of positive queries")
    axes[0].legend()
    for name, of_images in compared.items():
        pairs = zip(of_images, queries[original], strict=True)
        distances = torch.cat([distances_to_nearest(*pair) for pair in pairs]).cpu()
        axes[1].hist(distances[distances.isfinite()], bins=30, alpha=0.6, label=name)
    if compared:
        axes[1].set(xlabel=f"distance from the nearest of {original}", ylabel="queries")
        axes[1].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
