"""Where the decoder's queries come from (DINO, sec. 3.4 and fig. 5)."""

import torch
from torch import Tensor, nn

from ..types import Memory, Predictions, Queries
from .encoder import token_centres


class QuerySelection(nn.Module):
    """The tokens of the memory that score best become queries; their boxes are the anchors.

    `content="learned"` is DINO's mixed selection: query i starts from learned content i, whatever
    token it comes from. `content="memory"` is pure selection: it starts from the token.

    Padding and tokens at the very border score as well, all alike, from an empty feature. Where one
    is chosen, it stands for the box (1, 1, 1, 1), as published. With `padding_last`, padding is
    chosen only where there are not enough other tokens.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        class_head: nn.Module,
        box_head: nn.Module,
        content: str = "learned",
        padding_last: bool = False,
    ):
        super().__init__()
        if content not in ("learned", "memory"):
            raise ValueError(f"content must be 'learned' or 'memory', but is {content!r}")
        self.num_queries = num_queries
        self.padding_last = padding_last
        self.project = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.class_head = class_head
        self.box_head = box_head
        self.content = None
        if content == "learned":
            self.content = nn.Parameter(torch.empty(num_queries, embed_dim))
            nn.init.xavier_uniform_(self.content)
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, memory: Memory) -> tuple[Queries, Predictions]:
        """Queries without a gradient to the proposals, and the proposals (N = 1) for their loss.

        There are at most as many queries as tokens.
        """
        anchors, usable = propose_anchors(memory)
        tokens = memory.tokens.masked_fill(~usable.unsqueeze(-1), 0)
        tokens = self.norm(self.project(tokens))
        logits = self.class_head(tokens)  # (B, S, K)
        count = min(self.num_queries, logits.shape[1])
        scores = logits.amax(-1)
        if self.padding_last:
            scores = scores.masked_fill(memory.padding_mask, -torch.inf)
        chosen = scores.topk(count, 1).indices.unsqueeze(-1)  # (B, Q, 1)
        tokens, logits, anchors = (
            t.gather(1, chosen.expand(-1, -1, t.shape[-1])) for t in (tokens, logits, anchors)
        )
        boxes = (self.box_head(tokens) + anchors).sigmoid()
        if self.content is None:
            content = tokens.detach()
        else:
            content = self.content[:count].expand(boxes.shape[0], -1, -1)
        return Queries(content, boxes.detach()), Predictions(logits[None], boxes[None])


class LearnedQueries(nn.Module):
    """Static queries: content and anchors are parameters (DAB-DETR, sec. 4)."""

    def __init__(self, num_queries: int, embed_dim: int):
        super().__init__()
        self.content = nn.Parameter(torch.empty(num_queries, embed_dim))
        self.anchors = nn.Parameter(torch.empty(num_queries, 4))  # before the sigmoid
        nn.init.normal_(self.content)
        nn.init.normal_(self.anchors)

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The same queries for every image, and no proposals."""
        batch = memory.tokens.shape[0]
        content = self.content.expand(batch, -1, -1)
        return Queries(content, self.anchors.sigmoid().expand(batch, -1, -1)), None


def propose_anchors(memory: Memory) -> tuple[Tensor, Tensor]:
    """One box per token (Deformable DETR, A.4): its centre and a side of 0.05 * 2^level.

    Returns:
        anchors (B, S, 4) before the sigmoid, infinite where not usable, and usable (B, S): False on
        padding and where a coordinate lies outside (0.01, 0.99).
    """
    centres = token_centres(memory)
    sides = [
        centres.new_full((height * width,), 0.05 * 2**level)
        for level, (height, width) in enumerate(memory.spatial_shapes)
    ]
    sides = torch.cat(sides)[None, :, None].expand_as(centres)
    anchors = torch.cat([centres, sides], -1)
    usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding_mask
    logits = (anchors / (1 - anchors)).log()
    return logits.masked_fill(~usable.unsqueeze(-1), torch.inf), usable
