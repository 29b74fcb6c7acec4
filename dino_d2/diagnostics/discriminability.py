"""Where a detector looks: score maps of features and of cross-attention (Co-DETR, sec. 3.1)."""

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional

from ..box_ops import cxcywh_to_xyxy
from ..co_heads.pyramid import memory_maps
from ..models import DETR
from ..types import Memory


def level_maps(tokens: Tensor, memory: Memory) -> list[Tensor]:
    """Values (B, S, D) of all tokens as maps (B, D, h, w) of every level, zero on padding."""
    tokens = tokens.masked_fill(memory.padding_mask.unsqueeze(-1), 0)
    return memory_maps(tokens, memory)


def discriminability(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """D(F): how strong features are, relative to the strongest of their level.

    Args:
        maps: (B, D, h, w) of every level; of cross-attention, one channel.
        size: height and width of the padded image.

    Returns:
        (B, *size) in [0, 1]: the norm over channels, enlarged, averaged over levels.
    """
    scores = []
    for feature in maps:
        norm = feature.norm(dim=1, keepdim=True)
        norm = functional.interpolate(norm, size, mode="bilinear")[:, 0]
        highest = norm.amax((1, 2), keepdim=True)
        scores.append(norm / highest.clamp(min=torch.finfo(norm.dtype).tiny))
    return torch.stack(scores).mean(0)


def foreground(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W): the pixels whose centres are in one of the boxes (T, 4), relative cxcywh."""
    height, width = size
    x0, y0, x1, y1 = (side[:, None] for side in cxcywh_to_xyxy(boxes).unbind(1))
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    columns, rows = (x >= x0) & (x < x1), (y >= y0) & (y < y1)
    return (rows[:, :, None] & columns[:, None]).any(0)


def foreground_shares(
    scores: Tensor, boxes: Tensor, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """IoF and IoB: which shares of an image's foreground and background score above thresholds.

    A discriminative map takes in the objects before the background.

    Args:
        scores: (H, W), as from `discriminability`.
        boxes: (T, 4) of the image's objects, relative cxcywh.
        thresholds: (n,); by default 101 quantiles of the scores, as those of normalised features
            lie close together.

    Returns:
        2 x (n,) in [0, 1]; NaN where the image has no foreground, or no background.
    """
    inside = foreground(boxes, scores.shape)
    if thresholds is None:
        thresholds = scores.flatten().quantile(torch.linspace(0, 1, 101).to(scores))
    shares = []
    for part in (scores[inside], scores[~inside]):
        ordered = part.sort().values
        below = torch.searchsorted(ordered, thresholds.to(ordered), right=True)
        shares.append(1 - below / len(part))
    return shares[0], shares[1]


def cross_attention(detector: DETR, memory: Memory) -> Tensor:
    """(N, B, S): how much attention every token gets from all queries of each decoder layer.

    The mean over heads; attention to a token counts with its bilinear weight where samples lie
    between tokens. With dense attention, the tokens of an image get Q altogether.
    """
    values: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep_value(module, inputs, output):
        values.append(output.detach().requires_grad_())
        return values[-1]

    def keep_output(module, inputs):
        outputs.append(inputs[0])

    handles = []
    for layer in detector.decoder.layers:
        value, output = _value_and_output(layer.cross_attention)
        handles.append(value.register_forward_hook(keep_value))
        handles.append(output.register_forward_pre_hook(keep_output))
    try:
        with torch.enable_grad():
            detector.decoder(detector.query_source(memory)[0], memory, detector.heads)
            sums = [output.sum() for output in outputs]
    finally:
        for handle in handles:
            handle.remove()
    # Attention is linear in its values: how much an output grows with a value is the weight of it.
    gradients = [torch.autograd.grad(*pair)[0] for pair in zip(sums, values, strict=True)]
    return torch.stack(gradients).mean(-1)


def _value_and_output(attention: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The projections before and after the weighted sum: deformable attention's, or dense's."""
    if hasattr(attention, "value_proj"):
        return attention.value_proj, attention.output_proj
    return attention["value"], attention["output"]


def draw_score_maps(
    images: Sequence[np.ndarray],
    boxes: Sequence[Tensor],
    scores: Mapping[str, Sequence[Tensor]],
    out: str | PathLike,
) -> None:
    """Draw each image with its objects in the first row, and its maps below.

    Args:
        images: (h, w, 3) uint8.
        boxes: (T, 4) relative cxcywh of each image.
        scores: by name, (h, w) of each image.
        out: file to write.
    """
    figure = Figure(figsize=(3 * len(images), 2.6 * (1 + len(scores))))
    rows = figure.subplots(1 + len(scores), len(images), squeeze=False)
    for axes, image, objects in zip(rows[0], images, boxes, strict=True):
        axes.imshow(image)
        height, width = image.shape[:2]
        for x, y, w, h in objects.tolist():
            corner = (x - w / 2) * width, (y - h / 2) * height
            axes.add_patch(Rectangle(corner, w * width, h * height, fill=False, edgecolor="lime"))
    for row, (name, maps) in zip(rows[1:], scores.items(), strict=True):
        row[0].set_title(name, loc="left")
        for axes, scored in zip(row, maps, strict=True):
            axes.imshow(scored.cpu())  # each in its own range
    for axes in rows.flat:
        axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def plot_foreground_shares(
    curves: Mapping[str, Sequence[tuple[Tensor, Tensor]]], out: str | PathLike
) -> None:
    """Draw IoF over IoB, the mean of the images in which both exist.

    Args:
        curves: by name, what `foreground_shares` gives for each image.
        out: file to write.
    """
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    for name, of_images in curves.items():
        pairs = [torch.stack(pair).cpu() for pair in of_images]
        pairs = [pair for pair in pairs if pair.isfinite().all()]
        if pairs:
            inside, outside = torch.stack(pairs).mean(0)
            axes.plot(outside, inside, label=name)
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(xlabel="IoB", ylabel="IoF", xlim=(0, 1), ylim=(0, 1), title="foreground against rest")
    if curves:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
