"""Dense decoder layers whose queries and keys hold content and position side by side (Conditional
DETR, sec. 3.3; DAB-DETR, sec. 4).
"""

import torch
from torch import Tensor, nn

from ..layers import MLP, FeedForward, attend, encode_boxes, repeat
from ..types import Memory, Queries


class ConditionalDecoderLayer(nn.Module):
    """Self-attention among queries, dense attention to the memory, feed-forward; post-norm.

    With more than one level, each level is attended to by itself, and every query mixes the results
    (DN-DETR, official code of the deformable-encoder variant).

    Args:
        first: in the first layer, positional queries also take part in the content of the
            attention to the memory.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        ffn_dim: int,
        activation: str,
        first: bool,
    ):
        super().__init__()

        def project() -> nn.Linear:
            return nn.Linear(embed_dim, embed_dim)

        self.num_heads = num_heads
        names = ("query_content", "query_position", "key_content", "key_position", "value")
        self.self_attention = nn.ModuleDict({name: project() for name in (*names, "output")})
        self.self_attention_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = nn.ModuleDict({name: project() for name in (*names, "output")})
        self.cross_attention["query_sine"] = project()
        if not first:
            del self.cross_attention["query_position"]
        for attention in (self.self_attention, self.cross_attention):
            nn.init.zeros_(attention["output"].bias)
        self.level = nn.Linear(embed_dim, num_levels) if num_levels > 1 else None
        self.cross_attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, activation)

    def forward(
        self,
        content: Tensor,
        positions: Tensor,
        sine: Tensor,
        memory: Memory,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Content, positions and sine (B, Q, D), attn_mask ([B,] Q, Q)."""
        own = self.self_attention
        query = own["query_content"](content) + own["query_position"](positions)
        key = own["key_content"](content) + own["key_position"](positions)
        attended = attend(query, key, own["value"](content), self.num_heads, attn_mask)
        content = self.self_attention_norm(content + own["output"](attended))
        shares = None if self.level is None else self.level(query).softmax(-1)  # (B, Q, L)
        attended = self._attend_to_memory(content, positions, sine, memory, shares)
        content = self.cross_attention_norm(content + attended)
        return self.ffn(content)

    def _attend_to_memory(
        self,
        content: Tensor,
        positions: Tensor,
        sine: Tensor,
        memory: Memory,
        shares: Tensor | None,
    ) -> Tensor:
        project = self.cross_attention
        query = project["query_content"](content)
        key = project["key_content"](memory.tokens)
        key_position = project["key_position"](memory.positions)
        if "query_position" in project:
            query = query + project["query_position"](positions)
            key = key + key_position
        query = self._join(query, project["query_sine"](sine))
        key = self._join(key, key_position)
        value = project["value"](memory.tokens)
        blocked = memory.padding_mask[:, None]  # (B, 1, S)
        if shares is None:
            return project["output"](attend(query, key, value, self.num_heads, blocked))
        sizes = [height * width for height, width in memory.spatial_shapes]
        levels = zip(
            key.split(sizes, 1), value.split(sizes, 1), blocked.split(sizes, 2), strict=True
        )
        attended = [attend(query, *level[:2], self.num_heads, level[2]) for level in levels]
        return project["output"]((torch.stack(attended, -1) * shares[:, :, None]).sum(-1))

    def _join(self, content: Tensor, position: Tensor) -> Tensor:
        """2 x (B, Q, D) -> (B, Q, 2 D): in every head, content beside position."""
        parts = (t.unflatten(-1, (self.num_heads, -1)) for t in (content, position))
        return torch.cat(list(parts), -1).flatten(2)


class ConditionalPositions(nn.Module):
    """Positional queries and modulated sine encodings of the anchors (DAB-DETR, sec. 4.1 to 4.3).

    The sine encoding of the centre is weighed by the content of the query, from the second layer
    on, and its axes by a size that the content asks for, relative to the anchor's.
    """

    def __init__(self, embed_dim: int, temperature: float = 10000):
        super().__init__()
        self.temperature = temperature
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.scale = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.size = MLP(embed_dim, embed_dim, 2, 2)

    def forward(
        self, index: int, content: Tensor, queries: Queries, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Positions and sine (B, Q, D) for layer `index`."""
        embed_dim = content.shape[-1]
        encoded = encode_boxes(queries.anchors, embed_dim // 2, self.temperature)  # y, x, w, h
        encoded = encoded.to(content.dtype)
        positions = self.mlp(encoded)
        y, x = encoded[..., :embed_dim].chunk(2, -1)
        own = queries.anchors[..., 2:].clamp(min=1e-6)  # co-heads may give boxes without a size
        ratio = self.size(content).sigmoid() / own  # width, height
        if index:
            y_scale, x_scale = self.scale(content).chunk(2, -1)
            y, x = y * y_scale, x * x_scale
        return positions, torch.cat([y * ratio[..., 1:], x * ratio[..., :1]], -1)


def conditional_layers(
    num_layers: int, embed_dim: int, num_heads: int, num_levels: int, ffn_dim: int, activation: str
) -> nn.ModuleList:
    """The layers for a `Decoder`."""
    settings = (embed_dim, num_heads, num_levels, ffn_dim, activation)
    first = ConditionalDecoderLayer(*settings, first=True)
    others = repeat(ConditionalDecoderLayer(*settings, first=False), num_layers - 1)
    return nn.ModuleList([first, *others])
