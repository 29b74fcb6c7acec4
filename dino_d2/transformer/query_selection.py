"""Where the decoder's queries come from (DINO, sec. 3.4 and fig. 5)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers import encode_boxes
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

    class_agnostic = False  # the loss of the proposals knows classes

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
        scores = logits.amax(-1)
        if self.padding_last:
            scores = scores.masked_fill(memory.padding_mask, -torch.inf)
        chosen = choose(scores, self.num_queries)
        tokens, logits, anchors = (pick(t, chosen) for t in (tokens, logits, anchors))
        boxes = (self.box_head(tokens) + anchors).sigmoid()
        if self.content is None:
            content = tokens.detach()
        else:
            content = self.content[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        return Queries(content, boxes.detach()), Predictions(logits[None], boxes[None])


class TwoStageQueries(nn.Module):
    """The memory's best tokens give both positions and content of the queries, from their boxes
    alone (two-stage Deformable DETR, A.4).

    The first class head's output says whether there is any object. `content="learned"` takes only
    the positions from the boxes, and starts query i from learned content i (Co-DETR).
    """

    class_agnostic = True  # the loss of the proposals calls every object class 0

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        class_head: nn.Module,
        box_head: nn.Module,
        content: str = "box",
    ):
        super().__init__()
        if content not in ("box", "learned"):
            raise ValueError(f"content must be 'box' or 'learned', but is {content!r}")
        self.content = None
        if content == "learned":
            self.content = nn.Parameter(torch.empty(num_queries, embed_dim))
            nn.init.normal_(self.content)
        self.num_queries = num_queries
        self.project = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.class_head = class_head
        self.box_head = box_head
        self.from_box = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.from_box_norm = nn.LayerNorm(2 * embed_dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.xavier_uniform_(self.from_box.weight)

    def forward(self, memory: Memory) -> tuple[Queries, Predictions]:
        """Queries without a gradient to the proposals, and all S tokens' proposals (N = 1)."""
        anchors, usable = propose_anchors(memory)
        tokens = memory.tokens.masked_fill(~usable.unsqueeze(-1), 0)
        tokens = self.norm(self.project(tokens))
        logits = self.class_head(tokens)  # (B, S, K)
        boxes = (self.box_head(tokens) + anchors).sigmoid()
        chosen = choose(logits[..., 0], self.num_queries)
        best = pick(boxes, chosen).detach()
        encoded = encode_boxes(best, tokens.shape[-1] // 2, order=(0, 1, 2, 3))
        positions, content = self.from_box_norm(self.from_box(encoded)).chunk(2, -1)
        if self.content is not None:
            content = self.content[: best.shape[1]].expand(best.shape[0], -1, -1)
        return Queries(content, best, positions), Predictions(logits[None], boxes[None])


class LearnedQueries(nn.Module):
    """Static queries: content and anchors are parameters (DAB-DETR, sec. 4).

    Args:
        num_queries: anchors.
        content: "each" anchor has its own, "shared" is one for all (DN-DETR), "zero" is none.
        indicator: the last channel of the content is 0, which denoising queries have 1 in (DN-DETR,
            sec. 3.4).
        num_patterns: every anchor appears once per pattern, with the pattern's learned content
            added; 0 for anchors without one (Anchor DETR, sec. 3.3).
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        content: str = "each",
        indicator: bool = False,
        num_patterns: int = 0,
    ):
        super().__init__()
        rows = {"each": num_queries, "shared": 1, "zero": 0}
        if content not in rows:
            raise ValueError(f"content must be in {list(rows)}, but is {content!r}")
        self.embed_dim, self.num_patterns = embed_dim, num_patterns
        self.content = None
        if content != "zero":
            self.content = nn.Parameter(torch.empty(rows[content], embed_dim - int(indicator)))
            nn.init.normal_(self.content)
        self.anchors = nn.Parameter(torch.empty(num_queries, 4))  # before the sigmoid
        nn.init.normal_(self.anchors)
        self.patterns = None
        if num_patterns:
            self.patterns = nn.Parameter(torch.empty(num_patterns, embed_dim))
            nn.init.normal_(self.patterns)

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The same queries for every image, pattern by pattern, and no proposals."""
        batch, count = memory.tokens.shape[0], len(self.anchors)
        content = self.anchors.new_zeros(count, self.embed_dim)
        if self.content is not None:
            padded = functional.pad(self.content, (0, self.embed_dim - self.content.shape[1]))
            content = padded.expand(count, -1)
        anchors = self.anchors.sigmoid()
        if self.patterns is not None:
            content = (content + self.patterns[:, None]).flatten(0, 1)
            anchors = anchors.repeat(self.num_patterns, 1)
        return Queries(content.expand(batch, -1, -1), anchors.expand(batch, -1, -1)), None


class ReferencePointQueries(nn.Module):
    """Queries with learned content and positions, which give their reference points (Deformable
    DETR, sec. 4.1).
    """

    def __init__(self, num_queries: int, embed_dim: int):
        super().__init__()
        self.content = nn.Parameter(torch.empty(num_queries, embed_dim))
        self.positions = nn.Parameter(torch.empty(num_queries, embed_dim))
        nn.init.normal_(self.content)
        nn.init.normal_(self.positions)
        self.reference = nn.Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The same queries for every image, with points (B, Q, 2), and no proposals."""
        points = self.reference(self.positions).sigmoid()
        parts = (self.content, points, self.positions)
        return Queries(*(t.expand(memory.tokens.shape[0], -1, -1) for t in parts)), None


def choose(scores: Tensor, count: int) -> Tensor:
    """(B, S) -> (B, Q): indices of the best tokens; as many as there are, if they are fewer."""
    return scores.topk(min(count, scores.shape[1]), 1).indices


def pick(tokens: Tensor, chosen: Tensor) -> Tensor:
    """(B, S, n) and (B, Q) -> (B, Q, n)"""
    return tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


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
