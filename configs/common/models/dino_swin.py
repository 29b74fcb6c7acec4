"""DINO with Detectron2's Swin transformers; four or five scales."""

import copy

from .dino_r50 import model as _dino
from .swin import (
    BASE_384,
    LARGE_224,
    LARGE_384,
    SMALL_224,
    TINY_224,
    swin_base_384,
    swin_large_224,
    swin_large_384,
    swin_small_224,
    swin_tiny_224,
)


def _with_swin(backbone):
    model = copy.deepcopy(_dino)
    model.detector.backbone = backbone
    model.detector.in_features = ["p1", "p2", "p3"]
    return model


def _with_5_scales(model):
    model = copy.deepcopy(model)
    model.detector.backbone.out_indices = (0, 1, 2, 3)
    model.detector.in_features = ["p0", "p1", "p2", "p3"]
    model.detector.num_levels = 5
    return model


tiny_224 = _with_swin(swin_tiny_224)
small_224 = _with_swin(swin_small_224)
base_384 = _with_swin(swin_base_384)
large_224 = _with_swin(swin_large_224)
large_384 = _with_swin(swin_large_384)

tiny_224_5scale = _with_5_scales(tiny_224)
small_224_5scale = _with_5_scales(small_224)
base_384_5scale = _with_5_scales(base_384)
large_384_5scale = _with_5_scales(large_384)
