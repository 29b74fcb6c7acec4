"""The decoder: queries refine their boxes layer by layer (DINO, sec. 3)."""

import torch
from torch import Tensor, nn

from ..layers import (
    MLP,
    DeformableAttention,
    FeedForward,
    encode_boxes,
    init_transformer,
    repeat,
)
from ..types import Memory, Predictions, Queries


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward; post-norm."""

    def __init__(self, embed_dim, num_heads, num_levels, num_points, ffn_dim):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = DeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.cross_attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim)

    def forward(
        self,
        content: Tensor,
        positions: Tensor,
        reference: Tensor,
        memory: Memory,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Content and positions (B, Q, D), reference (B, Q, L, 4), attn_mask (Q, Q)."""
        placed = content + positions
        attended, _ = self.self_attention(
            placed, placed, content, attn_mask=attn_mask, need_weights=False
        )
        content = self.self_attention_norm(content + attended)
        attended = self.cross_attention(content + positions, reference, memory)
        content = self.cross_attention_norm(content + attended)
        return self.ffn(content)


class Decoder(nn.Module):
    """N layers, each of which scores its queries and moves their boxes.

    The box that a layer reports comes from its normalised output; the box that it hands to the next
    layer as reference comes from the output itself. Published weights rely on that difference.

    With `look_forward_twice` (DINO, sec. 3.5) the loss of a layer's box also trains the refinement
    of the layer before; without, gradients stop at the reference.

    With `padded_positions` (published) the positional queries encode boxes relative to the padded
    maps, so that the predictions of an image depend on what it is batched with. Without, they are
    relative to the image, and nothing does. Both are the same for images without padding.
    """

    def __init__(
        self,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        look_forward_twice: bool = True,
        padded_positions: bool = True,
    ):
        super().__init__()
        self.look_forward_twice = look_forward_twice
        self.padded_positions = padded_positions
        layer = DecoderLayer(embed_dim, num_heads, num_levels, num_points, ffn_dim)
        self.layers = repeat(layer, num_layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.position_mlp = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        init_transformer(self)

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        heads: nn.Module,
        attn_mask: Tensor | None = None,
    ) -> Predictions:
        """Predictions of every layer; `heads` scores and refines, attn_mask is (Q, Q)."""
        content, reference = queries
        attached = reference  # the same boxes, with the gradient to the layer before
        ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        logits, boxes = [], []
        for index, layer in enumerate(self.layers):
            on_levels = reference[:, :, None] * ratios  # (B, Q, L, 4)
            placed = on_levels[:, :, 0] if self.padded_positions else reference
            encoded = encode_boxes(placed, content.shape[-1] // 2)
            positions = self.position_mlp(encoded.to(content.dtype))
            content = layer(content, positions, on_levels, memory, attn_mask)
            output = self.norm(content)
            logits.append(heads.classify(index, output))
            source = attached if self.look_forward_twice else reference
            boxes.append(heads.refine(index, output, source))
            attached = heads.refine(index, content, reference)
            reference = attached.detach()
        return Predictions(torch.stack(logits), torch.stack(boxes))
