"""The multi-scale adapter (Co-DETR, sec. 3.2): from the encoder's memory to maps."""

from torch import Tensor, nn
from torch.nn import functional

from ..types import Memory


class MemoryPyramid(nn.Module):
    """Cuts the memory into its maps and adds further levels.

    A coarser level halves the resolution of the coarsest map with a 3x3 convolution and GroupNorm.
    A finer level, for encoders with a single scale, doubles that of the finest one by bilinear
    interpolation, with the same after it.
    """

    def __init__(self, embed_dim: int, num_finer: int = 0, num_coarser: int = 1):
        super().__init__()
        self.finer = nn.ModuleList(_adapt(embed_dim, 1) for _ in range(num_finer))
        self.coarser = nn.ModuleList(_adapt(embed_dim, 2) for _ in range(num_coarser))

    def forward(self, memory: Memory) -> list[Tensor]:
        """(B, D, h, w) each, finest first; padding is not masked, as published."""
        maps = memory_maps(memory.tokens, memory)
        for adapt in self.finer:
            larger = functional.interpolate(
                maps[0], scale_factor=2, mode="bilinear", align_corners=False
            )
            maps.insert(0, adapt(larger))
        for adapt in self.coarser:
            maps.append(adapt(maps[-1]))
        return maps


def memory_maps(tokens: Tensor, memory: Memory) -> list[Tensor]:
    """Values (B, S, D) of the memory's tokens as maps (B, D, h, w) of every level."""
    parts = tokens.split([height * width for height, width in memory.spatial_shapes], 1)
    return [
        part.transpose(1, 2).unflatten(2, shape)
        for part, shape in zip(parts, memory.spatial_shapes, strict=True)
    ]


def _adapt(embed_dim: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(embed_dim, embed_dim, 3, stride, padding=1)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.GroupNorm(32, embed_dim))


def adapted_strides(strides: list[int], num_finer: int, num_coarser: int) -> list[int]:
    """Strides of the maps, from those of the memory's levels."""
    finer = [strides[0] // 2**i for i in range(num_finer, 0, -1)]
    coarser = [strides[-1] * 2**i for i in range(1, num_coarser + 1)]
    return [*finer, *strides, *coarser]
