"""The decoder: queries refine their boxes layer by layer (Deformable DETR, A.4; DINO, sec. 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import MLP, DeformableAttention, FeedForward, encode_boxes, init_transformer
from ..types import Memory, Predictions, Queries


class DeformableDecoderLayer(nn.Module):
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
        on_levels: Tensor,
        memory: Memory,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Content and positions (B, Q, D), on_levels (B, Q, L, 2 or 4), attn_mask ([B,] Q, Q)."""
        placed = content + positions
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.repeat_interleave(self.self_attention.num_heads, 0)
        attended, _ = self.self_attention(
            placed, placed, content, attn_mask=attn_mask, need_weights=False
        )
        content = self.self_attention_norm(content + attended)
        attended = self.cross_attention(content + positions, on_levels, memory)
        content = self.cross_attention_norm(content + attended)
        return self.ffn(content)


class Decoder(nn.Module):
    """N layers, each of which scores its queries and moves their boxes.

    With a `norm` (DAB-DETR, DINO), the box that a layer reports comes from its normalised output,
    the box that it hands to the next layer as reference from the output itself. Published weights
    rely on that difference.

    Args:
        layers: modules such as `DeformableDecoderLayer`.
        placement: says where the queries are, in two tensors that the layers understand; see
            `BoxPositions`.
        norm: of the outputs that are scored, or None.
        look_forward_twice: the loss of a layer's box also trains the refinement of the layer before
            (DINO, sec. 3.5); otherwise gradients stop at the reference.
        refine: whether layers hand on their boxes; otherwise all start from the queries' anchors.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        placement: nn.Module,
        norm: nn.Module | None,
        look_forward_twice: bool,
        refine: bool = True,
    ):
        super().__init__()
        self.layers = layers
        self.placement = placement
        self.norm = norm
        self.look_forward_twice = look_forward_twice
        self.refine = refine
        init_transformer(self)

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        heads: nn.Module,
        attn_mask: Tensor | None = None,
    ) -> Predictions:
        """Predictions of every layer; `heads` scores and refines, attn_mask is ([B,] Q, Q)."""
        content, reference = queries.content, queries.anchors
        attached = reference  # the same boxes, with the gradient to the layer before
        logits, boxes = [], []
        for index, layer in enumerate(self.layers):
            places = self.placement(index, content, queries._replace(anchors=reference), memory)
            content = layer(content, *places, memory, attn_mask)
            output = content if self.norm is None else self.norm(content)
            logits.append(heads.classify(index, output))
            source = attached if self.look_forward_twice else reference
            boxes.append(heads.refine(index, output, source))
            if self.refine:
                attached = heads.refine(index, content, reference)
                reference = attached.detach()
        return Predictions(torch.stack(logits), torch.stack(boxes))


def decode_apart(
    decoder: Decoder,
    parts: Sequence[tuple[Queries, Tensor | None]],
    memory: Memory,
    heads: nn.Module,
) -> list[Predictions]:
    """Decode several sets of queries in one pass, none of which sees another.

    Args:
        parts: queries and their attn_mask ([B,] Q, Q), or None.

    Returns:
        the predictions of every part.
    """
    fields = zip(*(queries for queries, _ in parts), strict=True)
    joined = Queries(*(None if None in field else torch.cat(field, 1) for field in fields))
    sizes = [queries.anchors.shape[1] for queries, _ in parts]
    mask = _block_mask(sizes, [mask for _, mask in parts], joined.anchors)
    predictions = decoder(joined, memory, heads, mask)
    split = (tensor.split(sizes, 2) for tensor in predictions)
    return [Predictions(*of_part) for of_part in zip(*split, strict=True)]


def _block_mask(sizes: Sequence[int], masks: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """([B,] Q, Q): the parts' own masks as blocks, True elsewhere; like: (B, Q, ...)."""
    batched = any(mask is not None and mask.dim() == 3 for mask in masks)
    batch = like.shape[:1] if batched else ()
    joined = torch.ones(*batch, sum(sizes), sum(sizes), dtype=torch.bool, device=like.device)
    start = 0
    for size, mask in zip(sizes, masks, strict=True):
        block = slice(start, start + size)
        joined[..., block, block] = False if mask is None else mask
        start += size
    return joined


class BoxPositions(nn.Module):
    """Positional queries that encode the anchors, for deformable layers (DAB-DETR, sec. 4.1).

    Args:
        scaled: whether the content of the queries weighs the positions, from the second layer on
            (DAB-DETR, sec. 4.2).
        padded: encode boxes relative to the padded map (published), so that the predictions of an
            image depend on what it is batched with. Otherwise they are relative to the image, and
            nothing does. Both are the same for images without padding.
    """

    def __init__(self, embed_dim: int, scaled: bool = False, padded: bool = True):
        super().__init__()
        self.mlp = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.scale = MLP(embed_dim, embed_dim, embed_dim, 2) if scaled else None
        self.padded = padded

    def forward(
        self, index: int, content: Tensor, queries: Queries, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Positions (B, Q, D) for layer `index`, and the anchors on every level (B, Q, L, 4)."""
        on_levels = put_on_levels(queries.anchors, memory)
        boxes = on_levels[:, :, 0] if self.padded else queries.anchors
        encoded = encode_boxes(boxes, content.shape[-1] // 2).to(content.dtype)
        positions = self.mlp(encoded)
        if self.scale is not None and index:
            positions = positions * self.scale(content)
        return positions, on_levels


class GivenPositions(nn.Module):
    """Positions that come with the queries and stay the same (Deformable DETR)."""

    def forward(
        self, index: int, content: Tensor, queries: Queries, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Positions (B, Q, D), and the anchors on every level (B, Q, L, 2 or 4)."""
        return queries.positions, put_on_levels(queries.anchors, memory)


def put_on_levels(anchors: Tensor, memory: Memory) -> Tensor:
    """(B, Q, 2 or 4) relative to the image -> (B, Q, L, 2 or 4) relative to each padded map."""
    ratios = memory.valid_ratios.repeat(1, 1, anchors.shape[-1] // 2)
    return anchors[:, :, None] * ratios[:, None]
