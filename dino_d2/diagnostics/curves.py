"""Loss and AP over training."""

import json
from os import PathLike
from pathlib import Path

from matplotlib.figure import Figure

_LOSSES = ("total_loss", "loss_class", "loss_bbox", "loss_giou")
_METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "ema/bbox/AP")


def plot_curves(metrics: str | PathLike, out: str | PathLike) -> None:
    """Draw a picture from a `metrics.json`, see `read_metrics`.

    Left the total loss and the parts of the last layer, right AP, AP50 and AP75, and the AP
    of averaged weights.
    """
    lines = read_metrics(metrics)
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    for axes, names, title in ((left, _LOSSES, "loss"), (right, _METRICS, "AP on the test set")):
        for name in names:
            points = points_of(lines, name)
            if points:
                style = "o" if len(points) == 1 else "-"  # a line of one point is invisible
                axes.plot(*zip(*points, strict=True), style, label=name.replace("bbox/", ""))
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    left.set_yscale("log")
    right.set_ylim(0, 100)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def points_of(lines: list[dict], name: str) -> list[tuple[int, float]]:
    """(iteration, value) wherever a metric was written, see `read_metrics`."""
    return [(line["iteration"], line[name]) for line in lines if name in line]


def read_metrics(path: str | PathLike) -> list[dict]:
    """The lines of a `metrics.json` by iteration, the last one of each; a line that a killed run
    left unfinished is passed over.
    """
    by_iteration: dict[int, dict] = {}
    for line in Path(path).read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        by_iteration.setdefault(values["iteration"], {}).update(values)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]
