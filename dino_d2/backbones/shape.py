"""What a backbone says about its feature maps."""

from typing import NamedTuple


class FeatureShape(NamedTuple):
    """A feature map's number of channels and its stride in pixels."""

    channels: int
    stride: int
