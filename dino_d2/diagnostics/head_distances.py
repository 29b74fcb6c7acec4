"""How differently detection heads look at the same features (Co-DETR, sec. 4.4, fig. 6)."""

from collections.abc import Mapping
from os import PathLike

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..types import Memory
from .discriminability import discriminability, level_maps


def grad_cam(score: Tensor, memory: Memory, size: tuple[int, int]) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of a head's score on the encoder's tokens.

    Args:
        score: a scalar, computed from `memory.tokens`, which must require gradients; for a head,
            the sum of its detections' scores.
        size: height and width of the padded image.

    Returns:
        (B, *size) in [0, 1], averaged over levels like `discriminability`.
    """
    (gradient,) = torch.autograd.grad(score, memory.tokens, retain_graph=True)
    features, gradients = (level_maps(t, memory) for t in (memory.tokens.detach(), gradient))
    cams = [
        (feature * slope.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
        for feature, slope in zip(features, gradients, strict=True)
    ]
    return discriminability(cams, size)


def head_distances(cams: Mapping[str, Tensor]) -> Tensor:
    """(K, K): S_ij, the KL divergence of head j's map from head i's, averaged over images.

    The softmax makes distributions of the maps. The paper does not say what does; so, distances are
    of the size that it reports.

    Args:
        cams: by head, (images, H, W) in [0, 1].
    """
    logs = torch.stack([cam.flatten(1).log_softmax(1) for cam in cams.values()])  # (K, images, HW)
    rows = [(log.exp() * (log - logs)).sum(-1).mean(-1) for log in logs]
    return torch.stack(rows)


def head_conflicts(distances: Tensor) -> Tensor:
    """(K,): S_i, the mean distance of each head to the others and from them.

    Args:
        distances: (K, K) as from `head_distances`, K > 1.
    """
    others = len(distances) - 1
    own = distances.diagonal()
    return (distances.sum(0) + distances.sum(1) - 2 * own) / (2 * others)


def draw_head_distances(
    names: list[str] | tuple[str, ...], distances: Tensor, out: str | PathLike
) -> None:
    """Draw the matrix (K, K) of `head_distances` with its numbers."""
    figure = Figure(figsize=(2 + len(names), 1.5 + len(names)))
    axes = figure.subplots()
    axes.imshow(distances.cpu(), cmap="Blues", vmin=0)
    for i, row in enumerate(distances.tolist()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.4f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("KL divergence of heads")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
