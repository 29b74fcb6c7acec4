"""The reference case `criterion_unit`: synthetic outputs of all groups, in the project's types."""

import golden
import torch
from golden import read_arrays, read_json

from dino_d2.losses import pack_targets
from dino_d2.types import Predictions

ARRAYS = read_arrays("dino/criterion_unit")
VARIANTS = read_json("dino/criterion_unit", "losses")
# group -> the official names of its layers
LAYERS = {
    "decoder": ("aux0", "aux1", "last"),
    "encoder proposals": ("interm",),
    "denoising": ("dn_aux0", "dn_aux1", "dn_last"),
}


def make_predictions(group):
    """Leaves that record gradients."""
    parts = (
        torch.stack([torch.from_numpy(ARRAYS[f"in.{name}.{part}"]) for name in LAYERS[group]])
        for part in ("logits", "boxes")
    )
    return Predictions(*(part.requires_grad_() for part in parts))


def make_targets(variant):
    like = torch.zeros((), dtype=torch.float64)
    return pack_targets(golden.make_targets(VARIANTS[variant]["targets"]), 91, like)
