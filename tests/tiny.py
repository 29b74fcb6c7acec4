"""A DINO that is small enough to run in every test, with its batches and targets."""

from types import SimpleNamespace

import torch
from torch import nn

from dino_d2.models import build_dino
from dino_d2.types import Target

NUM_CLASSES = 5
SETTINGS = {
    "num_classes": NUM_CLASSES,
    "num_levels": 3,
    "num_queries": 12,
    "embed_dim": 32,
    "num_heads": 4,
    "num_points": 2,
    "ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "denoising_queries": 16,
}


class StubBackbone(nn.Module):
    """Two convolutions: maps of stride 8 and 16."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 8, 8)
        self.coarse = nn.Conv2d(8, 12, 2, 2)

    def output_shape(self):
        return {"fine": SimpleNamespace(channels=8), "coarse": SimpleNamespace(channels=12)}

    def forward(self, images):
        fine = self.fine(images)
        return {"fine": fine, "coarse": self.coarse(fine)}


def tiny_dino(dtype=torch.float64, **settings):
    """With noise on all parameters: right after initialisation, many gradients are zero."""
    model = build_dino(StubBackbone(), ["fine", "coarse"], **{**SETTINGS, **settings}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tiny_batch(batch=2, dtype=torch.float64):
    """Images of 64 x 96 pixels, and a padding mask without padding."""
    mask = torch.zeros(batch, 64, 96, dtype=torch.bool)
    return torch.randn(batch, 3, 64, 96, dtype=dtype), mask


def tiny_targets(*counts):
    """So many objects in each image, all of them within it."""
    scale, start = torch.tensor([[0.7, 0.7, 0.2, 0.2], [0.15, 0.15, 0.1, 0.1]]).double()
    return [
        Target(
            torch.randint(NUM_CLASSES, (count,)),
            torch.rand(count, 4, dtype=torch.float64) * scale + start,
        )
        for count in counts
    ]
