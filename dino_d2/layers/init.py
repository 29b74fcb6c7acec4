"""How the family's transformers start."""

import copy

from torch import nn

from .attention import DeformableAttention


def repeat(layer: nn.Module, count: int) -> nn.ModuleList:
    """Independent copies; biases and norms of all copies start equal, as in the official code."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform weights; deformable attention starts as its own pattern of directions."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, DeformableAttention):
            child.reset_parameters()
