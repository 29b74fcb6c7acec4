"""The multi-scale deformable encoder (Deformable DETR, sec. 4.1)."""

import torch
from torch import Tensor, nn

from ..layers import MLP, DeformableAttention, FeedForward, init_transformer, repeat
from ..transfer import to_device
from ..types import FeaturePyramid, Memory


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; post-norm."""

    def __init__(self, embed_dim, num_heads, num_levels, num_points, ffn_dim):
        super().__init__()
        self.attention = DeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim)

    def forward(self, memory: Memory, reference_points: Tensor) -> Memory:
        """reference_points: (B, S, L, 2)."""
        attended = self.attention(memory.tokens + memory.positions, reference_points, memory)
        tokens = self.ffn(self.attention_norm(memory.tokens + attended))
        return memory._replace(tokens=tokens)


class DeformableEncoder(nn.Module):
    """Flattens a pyramid into tokens and lets every token attend to all levels."""

    def __init__(self, num_layers, embed_dim, num_heads, num_levels, num_points, ffn_dim):
        super().__init__()
        layer = DeformableEncoderLayer(embed_dim, num_heads, num_levels, num_points, ffn_dim)
        self.layers = repeat(layer, num_layers)
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim))
        init_transformer(self)
        nn.init.normal_(self.level_embed)

    def forward(self, pyramid: FeaturePyramid) -> Memory:
        """Encode all levels together."""
        positions = [
            position.to(embedding.dtype) + embedding[:, None, None]
            for position, embedding in zip(pyramid.positions, self.level_embed, strict=True)
        ]
        memory = flatten_pyramid(pyramid._replace(positions=positions))
        # A point relative to the image becomes one relative to each level's padded map.
        reference_points = token_centres(memory)[:, :, None] * memory.valid_ratios[:, None]
        for layer in self.layers:
            memory = layer(memory, reference_points)
        return memory


class DenseEncoderLayer(nn.Module):
    """Self-attention of every token to every other, then a feed-forward network; post-norm."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int, activation: str):
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, activation)

    def forward(self, memory: Memory, positions: Tensor) -> Memory:
        """positions: (B, S, D)."""
        placed = memory.tokens + positions
        attended, _ = self.attention(
            placed,
            placed,
            memory.tokens,
            key_padding_mask=memory.padding_mask,
            need_weights=False,
        )
        return memory._replace(tokens=self.ffn(self.attention_norm(memory.tokens + attended)))


class DenseEncoder(nn.Module):
    """DETR's encoder; every layer weighs the positions by what its tokens hold (DAB-DETR, official
    code).
    """

    def __init__(
        self, num_layers: int, embed_dim: int, num_heads: int, ffn_dim: int, activation: str
    ):
        super().__init__()
        self.layers = repeat(
            DenseEncoderLayer(embed_dim, num_heads, ffn_dim, activation), num_layers
        )
        self.scale = MLP(embed_dim, embed_dim, embed_dim, 2)
        init_transformer(self)

    def forward(self, pyramid: FeaturePyramid) -> Memory:
        """Encode all levels together."""
        memory = flatten_pyramid(pyramid)
        for layer in self.layers:
            memory = layer(memory, memory.positions * self.scale(memory.tokens))
        return memory


def flatten_pyramid(pyramid: FeaturePyramid) -> Memory:
    """All levels as one sequence of tokens, level by level in row-major order."""
    tokens, positions = (
        torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        for maps in (pyramid.maps, pyramid.positions)
    )
    padding_mask = torch.cat([mask.flatten(1) for mask in pyramid.padding_masks], 1)
    shapes = tuple((m.shape[-2], m.shape[-1]) for m in pyramid.maps)
    width_height = [(width, height) for height, width in shapes]
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    sizes = to_device(width_height, dtype, tokens.device)
    valid_sizes = torch.stack([valid_size(mask) for mask in pyramid.padding_masks], 1)
    positions = positions.to(tokens.dtype)
    return Memory(tokens, positions, padding_mask, shapes, sizes, valid_sizes / sizes)


def valid_size(padding_mask: Tensor) -> Tensor:
    """(B, h, w) -> (B, 2): how much of the (width, height) is image, from the top left corner."""
    valid = ~padding_mask
    return torch.stack([valid[:, 0, :].sum(1), valid[:, :, 0].sum(1)], -1)


def token_centres(memory: Memory) -> Tensor:
    """(B, S, 2): the centre (x, y) of every token's cell, relative to its image without padding.

    Tokens of padding lie beyond 1.
    """
    ratios = memory.valid_ratios
    centres = []
    for level, (height, width) in enumerate(memory.spatial_shapes):
        y = torch.arange(height, device=ratios.device, dtype=ratios.dtype) + 0.5
        x = torch.arange(width, device=ratios.device, dtype=ratios.dtype) + 0.5
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (h * w, 2)
        # Whole numbers, so that 0.5 / 50 is the same 0.01 here as in a threshold.
        image_size = (ratios[:, level] * memory.level_sizes[level]).round()
        centres.append(grid / image_size[:, None])
    return torch.cat(centres, 1)
