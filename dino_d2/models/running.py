"""Other ways to run the layers of encoder and decoder, with the same results.

They nest: compile first, then recompute.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .detr import DETR


def transformer_layers(detector: DETR) -> list[nn.Module]:
    """Those of the encoder, then those of the decoder."""
    return [*detector.encoder.layers, *detector.decoder.layers]


def compile_layers(detector: DETR, backend: str = "inductor") -> None:
    """Compile each layer for any number and size of images; layers of a kind share the result.

    All around them stays eager: matching, denoising and losses depend on the number of objects.
    """
    for layer in transformer_layers(detector):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def recompute_layers(detector: DETR) -> None:
    """Keep only the inputs of each layer; backward computes the rest again (activation
    checkpointing). Gradients are the same, for about a third more time.
    """
    for layer in transformer_layers(detector):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
