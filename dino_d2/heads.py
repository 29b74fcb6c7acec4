"""Scores classes and refines boxes after every decoder layer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .box_ops import inverse_sigmoid
from .layers import MLP

PRIOR = 0.01  # of an object at a query, before training (RetinaNet, sec. 4.1)


def make_class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """(..., D) -> (..., K) logits that start at the prior."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def make_box_head(embed_dim: int) -> MLP:
    """(..., D) -> (..., 4) offsets before the sigmoid, that start at zero."""
    head = MLP(embed_dim, embed_dim, 4, 3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


class Heads(nn.Module):
    """A class head and a box head for N decoder layers: one pair for all, or one pair each.

    Args:
        size_bias: what the first (or only) box head adds to the logits of width and height at the
            start of training.
        eps: of `inverse_sigmoid`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_layers: int,
        shared: bool,
        size_bias: float = 0.0,
        eps: float = 1e-3,
    ):
        super().__init__()
        count = 1 if shared else num_layers
        self.num_classes = num_classes
        self.eps = eps
        self.class_heads = nn.ModuleList(
            make_class_head(embed_dim, num_classes) for _ in range(count)
        )
        self.box_heads = nn.ModuleList(make_box_head(embed_dim) for _ in range(count))
        nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], size_bias)

    def classify(self, layer: int, content: Tensor) -> Tensor:
        """(B, Q, D) -> logits (B, Q, K), in the precision of the weights, as ranking needs it."""
        head = self.class_heads[layer % len(self.class_heads)]
        with torch.autocast(content.device.type, enabled=False):
            return head(content.to(head.weight.dtype))

    def refine(self, layer: int, content: Tensor, reference: Tensor) -> Tensor:
        """Move reference boxes (B, Q, 4), or points (B, Q, 2), by what content (B, Q, D) says:
        boxes (B, Q, 4); iterative refinement (Deformable DETR, A.4).
        """
        offsets = self.box_heads[layer % len(self.box_heads)](content)
        known = inverse_sigmoid(reference, self.eps)
        return (offsets + functional.pad(known, (0, 4 - known.shape[-1]))).sigmoid()
