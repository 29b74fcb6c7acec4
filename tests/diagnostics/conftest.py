import pytest
from matplotlib.figure import Figure

from dino_d2.diagnostics import (
    curves,
    detections,
    discriminability,
    head_distances,
    instability,
    queries,
)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    drawn = []

    def keep(*args, **kwargs):
        drawn.append(Figure(*args, **kwargs))
        return drawn[-1]

    for module in (curves, detections, discriminability, head_distances, instability, queries):
        monkeypatch.setattr(module, "Figure", keep)
    return drawn
