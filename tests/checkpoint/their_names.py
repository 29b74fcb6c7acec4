"""Weights of small models of ours by the names that another repository gives them."""

import re

import torch
from torch import nn

from dino_d2.backbones import FeatureShape

SIZES = {
    "num_queries": 5,
    "embed_dim": 32,
    "num_heads": 2,
    "ffn_dim": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
}


class NamedBackbone(nn.Module):
    """Named like Detectron2's ResNet."""

    def __init__(self):
        super().__init__()
        self.res2 = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 1)})])

    def output_shape(self):
        return {f"res{i}": FeatureShape(8, 4 << i) for i in (3, 4, 5)}


def random_state(build, in_features=("res3", "res4", "res5"), **settings):
    model = build(NamedBackbone(), in_features, **{**SIZES, **settings})
    return {name: torch.rand_like(tensor) for name, tensor in model.state_dict().items()}


def by_their_names(state, table):
    """table: (our beginning, theirs) as for `re.sub`; the first row that matches counts."""
    weights = {}
    for name, tensor in state.items():
        pattern, theirs = next(row for row in table if re.match(row[0], name))
        weights[re.sub(f"^{pattern}", theirs, name)] = tensor
    return weights


def with_copies(weights, *copies):
    """Further names of the same weights: (their beginning, another one)."""
    result = dict(weights)
    for beginning, other in copies:
        of_it = [name for name in weights if name.startswith(beginning)]
        result.update({other + n.removeprefix(beginning): weights[n] for n in of_it})
    return result
