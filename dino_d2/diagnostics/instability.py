"""How much the matching of queries and objects changes during training (DN-DETR, sec. 3.1)."""

from collections.abc import Mapping
from os import PathLike

import numpy as np
from matplotlib.figure import Figure

from ..types import Assignment
from .curves import points_of, read_metrics


def matched_objects(
    assignment: Assignment, counts: tuple[int, ...], num_queries: int, layer: int = -1
) -> np.ndarray:
    """(B, Q): the object of its image that every query is matched to by a layer, or -1.

    Args:
        assignment: of a matcher.
        counts: T of every image.
    """
    matched = np.full((len(counts), num_queries), -1)
    starts = np.cumsum([0, *counts])
    image = assignment.image.cpu().numpy()
    target = assignment.target[layer].cpu().numpy() - starts[image]
    matched[image, assignment.query[layer].cpu().numpy()] = target
    return matched


def instability(before: np.ndarray, after: np.ndarray) -> float:
    """IS: how many queries of an image are matched to another object than before, on average.

    Args:
        before, after: (images, Q), as from `matched_objects`, for the same images with their
            objects in the same order.

    Returns:
        Between 0 and twice the average number of objects.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"matchings of shapes {before.shape} and {after.shape} do not compare")
    return float((before != after).sum(-1).mean())


def plot_instability(runs: Mapping[str, str | PathLike], out: str | PathLike) -> None:
    """Draw IS and AP over training for runs side by side.

    Args:
        runs: `metrics.json` of each run, by the name to show.
        out: file to write.
    """
    lines = {name: read_metrics(metrics) for name, metrics in runs.items()}
    figure = Figure(figsize=(11, 4))
    panels = {"instability": "instability of the matching (IS)", "bbox/AP": "AP on the test set"}
    for axes, (metric, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for index, (name, of_run) in enumerate(lines.items()):
            points = points_of(of_run, metric)
            if points:
                axes.plot(*zip(*points, strict=True), f"C{index}o-", label=name)
        axes.set(xlabel="iteration", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
