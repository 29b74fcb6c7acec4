"""Detectors that are small enough to run in every test, with their batches and targets."""

from types import SimpleNamespace

import torch
from torch import nn

from dino_d2.layers import SinePositionEncoding
from dino_d2.models import (
    build_co_detr,
    build_dab_deformable_detr,
    build_dab_detr,
    build_deformable_detr,
    build_dino,
    build_dn_detr,
)
from dino_d2.types import FeaturePyramid, Memory, Target

NUM_CLASSES = 5
SETTINGS = {
    "in_features": ["fine", "coarse"],
    "num_classes": NUM_CLASSES,
    "num_levels": 3,
    "num_queries": 12,
    "embed_dim": 32,
    "num_heads": 4,
    "num_points": 2,
    "ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
}
CO_HEADS = ("faster_rcnn", "atss", "retinanet", "fcos")


def build_co_dino(*args, co_heads=CO_HEADS, **settings):
    return build_co_detr(build_dino(*args, **settings), co_heads)


def build_co_deformable(*args, **settings):
    return build_co_detr(build_deformable_detr(*args, **settings), CO_HEADS)


def build_co_dab(*args, **settings):
    """A single scale, from which the heads get three."""
    return build_co_detr(build_dab_detr(*args, **settings), CO_HEADS, num_finer=1)


DENSE = {"in_features": ["coarse"], "num_levels": 1}
FAMILY = {  # builder, and settings other than those above
    "dino": (build_dino, {"denoising_queries": 16}),
    "dab_detr": (build_dab_detr, DENSE),
    "dab_detr_patterns": (build_dab_detr, {**DENSE, "num_patterns": 2}),
    "dab_deformable_detr": (build_dab_deformable_detr, {}),
    "dab_deformable_detr_two_stage": (build_dab_deformable_detr, {"two_stage": True}),
    "dn_detr": (build_dn_detr, DENSE),
    "dn_detr_patterns": (build_dn_detr, {**DENSE, "num_patterns": 2}),
    "dn_detr_deformable_encoder": (build_dn_detr, {"num_patterns": 2, "activation": "relu"}),
    "dn_deformable_detr": (build_dn_detr, {"deformable": True}),
    "deformable_detr": (build_deformable_detr, {}),
    "deformable_detr_refine": (build_deformable_detr, {"box_refinement": True}),
    "deformable_detr_two_stage": (
        build_deformable_detr,
        {"box_refinement": True, "two_stage": True},
    ),
}

CO_FAMILY = {
    "co_dino": (build_co_dino, {"denoising_queries": 16}),
    "co_deformable_detr_two_stage": (
        build_co_deformable,
        {
            "box_refinement": True,
            "two_stage": True,
            "mixed_selection": True,
            "look_forward_twice": True,
        },
    ),
    "co_dab_detr": (build_co_dab, DENSE),
}


class StubBackbone(nn.Module):
    """Two convolutions: maps of stride 8 and 16."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 8, 8)
        self.coarse = nn.Conv2d(8, 12, 2, 2)

    def output_shape(self):
        return {
            "fine": SimpleNamespace(channels=8, stride=8),
            "coarse": SimpleNamespace(channels=12, stride=16),
        }

    def forward(self, images):
        fine = self.fine(images)
        return {"fine": fine, "coarse": self.coarse(fine)}


def tiny_detector(name, dtype=torch.float64, **settings):
    """With noise on all parameters: right after initialisation, many gradients are zero."""
    build, own = {**FAMILY, **CO_FAMILY}[name]
    model = build(StubBackbone(), **{**SETTINGS, **own, **settings}).to(dtype)
    return add_noise(model)


def tiny_dino(dtype=torch.float64, **settings):
    return tiny_detector("dino", dtype, **settings)


@torch.no_grad()
def add_noise(module, amount=0.1):
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=amount)
    return module


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


def make_memory(shapes, valid, embed_dim=8):
    """Random tokens. shapes: (height, width) of each level; valid: without padding, by image."""
    masks = torch.ones(len(valid), sum(h * w for h, w in shapes), dtype=torch.bool)
    for mask, sizes in zip(masks, valid, strict=True):
        parts = mask.split([h * w for h, w in shapes])
        for part, shape, (height, width) in zip(parts, shapes, sizes, strict=True):
            part.view(shape)[:height, :width] = False
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)
    valid_sizes = torch.tensor(valid, dtype=torch.float64).flip(-1)
    tokens, positions = torch.randn(2, *masks.shape, embed_dim, dtype=torch.float64)
    return Memory(tokens.requires_grad_(), positions, masks, shapes, sizes, valid_sizes / sizes)


def make_pyramid(image_maps):
    """Pads every image's maps to the largest ones, with values that must not matter."""
    maps, masks = [], []
    for of_level in zip(*image_maps, strict=True):
        height, width = (max(m.shape[side] for m in of_level) for side in (1, 2))
        maps.append(torch.full((len(of_level), 32, height, width), 7.0, dtype=torch.float64))
        masks.append(torch.ones(len(of_level), height, width, dtype=torch.bool))
        for image, m in enumerate(of_level):
            maps[-1][image, :, : m.shape[1], : m.shape[2]] = m
            masks[-1][image, : m.shape[1], : m.shape[2]] = False
    positions = [SinePositionEncoding(32)(mask, torch.float64) for mask in masks]
    return FeaturePyramid(tuple(maps), tuple(masks), tuple(positions))


def random_maps(shapes):
    return [torch.randn(32, *shape, dtype=torch.float64) for shape in shapes]


def after_neck(model, pyramid):
    """Predictions and proposals."""
    memory = model.encoder(pyramid)
    queries, proposals = model.query_source(memory)
    return model.decoder(queries, memory, model.heads), proposals
