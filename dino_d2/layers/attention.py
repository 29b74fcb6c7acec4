"""Multi-scale deformable attention as a layer, and dense attention without projections."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import ms_deform_attn_fused
from ..types import Memory


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, blocked: Tensor | None
) -> Tensor:
    """Dense multi-head attention of what is projected already.

    Args:
        query, key: (B, Q, D') and (B, S, D').
        value: (B, S, D).
        blocked: broadcasts to (B, Q, S); True where attention is blocked.

    Returns:
        (B, Q, D); 0 for a query that may attend to nothing.
    """
    query, key, value = (
        t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value)
    )
    allowed = None if blocked is None else ~blocked.unsqueeze(-3)
    attended = functional.scaled_dot_product_attention(query, key, value, allowed)
    return attended.transpose(1, 2).flatten(2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, sec. 4.1, eq. 3).

    B images, Q queries, S tokens, H heads, L levels, P points, D channels.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform attention; each head looks along its own direction, point p at p + 1 pixels."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)  # (H, 2)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None, :] * steps[None, None, :, None]  # (H, 1, P, 2)
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.weight.zero_()
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer, init in (
            (self.attention_weights, nn.init.zeros_),
            (self.value_proj, nn.init.xavier_uniform_),
            (self.output_proj, nn.init.xavier_uniform_),
        ):
            init(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Attend from every query to samples around its reference on every level.

        Args:
            query: (B, Q, D), positions added.
            reference: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes, relative to the padded
                maps. Offsets count in pixels of the level for points, in halves of the box's size
                per point for boxes.
            memory: the tokens attended to; tokens of padding count as zero.

        Returns:
            (B, Q, D)
        """
        batch, queries, _ = query.shape
        samples = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(memory.tokens).masked_fill(memory.padding_mask.unsqueeze(-1), 0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, H, D/H)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        logits = self.attention_weights(query).view(samples)
        output = ms_deform_attn_fused(value, memory.spatial_shapes, reference, offsets, logits)
        return self.output_proj(output)
