"""From backbone features to the pyramid that the transformer works on."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from ..types import FeaturePyramid


class Neck(nn.Module):
    """Projects backbone features to D channels and adds coarser levels (Deformable DETR, A.2).

    Each feature goes through a 1x1 convolution and GroupNorm. Every level beyond them halves the
    resolution with a 3x3 convolution: the first of the last feature itself, further ones of the
    level before. With `norm=False` (DAB-DETR) there is no GroupNorm, with
    `bias=False` (Co-DETR) no bias in the convolutions. With `project=False` the features are the
    levels already, as those of a simple feature pyramid.

    Raises:
        ValueError: fewer levels than features, or features that need a projection without one.
    """

    def __init__(
        self,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        embed_dim: int,
        num_levels: int,
        position_encoding: nn.Module,
        norm: bool = True,
        bias: bool = True,
        project: bool = True,
    ):
        super().__init__()
        if num_levels < len(in_features):
            raise ValueError(f"num_levels {num_levels} is below the features {list(in_features)}")
        if not project and [*in_channels] != [embed_dim] * num_levels:
            raise ValueError(
                f"without projection, features must be {num_levels} maps of {embed_dim} channels, "
                f"not of {list(in_channels)}"
            )
        self.in_features = tuple(in_features)
        self.embed_dim = embed_dim
        self.position_encoding = position_encoding
        extra = num_levels - len(in_features)
        extra_channels = [in_channels[-1], *[embed_dim] * extra][:extra]
        if not project:
            self.projections = nn.ModuleList(nn.Identity() for _ in in_features)
            return
        self.projections = nn.ModuleList(
            [self._project(channels, embed_dim, 1, 1, norm, bias) for channels in in_channels]
            + [self._project(channels, embed_dim, 3, 2, norm, bias) for channels in extra_channels]
        )

    @staticmethod
    def _project(
        in_channels: int, out_channels: int, kernel: int, stride: int, norm: bool, bias: bool
    ) -> nn.Sequential:
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
        nn.init.xavier_uniform_(convolution.weight)
        if bias:
            nn.init.zeros_(convolution.bias)
        return nn.Sequential(convolution, *([nn.GroupNorm(32, out_channels)] if norm else []))

    def forward(self, features: Mapping[str, Tensor], padding_mask: Tensor) -> FeaturePyramid:
        """Features by name, each (B, C, h, w), and the images' padding mask (B, H, W)."""
        maps = []
        source = None
        for level, project in enumerate(self.projections):
            if level < len(self.in_features):
                source = features[self.in_features[level]]
            maps.append(project(source))
            if level >= len(self.in_features):
                source = maps[-1]
        float_mask = padding_mask[:, None].float()
        masks = [functional.interpolate(float_mask, m.shape[-2:])[:, 0].bool() for m in maps]
        positions = [self.position_encoding(mask, maps[0].dtype) for mask in masks]
        return FeaturePyramid(tuple(maps), tuple(masks), tuple(positions))
