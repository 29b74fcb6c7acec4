"""Detectors, assembled from the parts."""

from .co_detr import build_co_deformable_base, build_co_detr, build_co_dino_base
from .dab_detr import build_dab_deformable_detr, build_dab_detr
from .deformable_detr import build_deformable_detr
from .detr import DETR
from .dino import build_dino
from .dn_detr import build_dn_detr
from .running import compile_layers, recompute_layers, transformer_layers

__all__ = [
    "DETR",
    "build_co_deformable_base",
    "build_co_detr",
    "build_co_dino_base",
    "build_dab_deformable_detr",
    "build_dab_detr",
    "build_deformable_detr",
    "build_dino",
    "build_dn_detr",
    "compile_layers",
    "recompute_layers",
    "transformer_layers",
]
