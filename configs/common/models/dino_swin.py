"""DINO with Detectron2's Swin transformers; four or five scales."""

import copy

from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from .dino_r50 import model as _dino

_RELEASES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"


def _with_swin(size, window, embed_dim, depths, num_heads):
    model = copy.deepcopy(_dino)
    model.detector.backbone = L(SwinTransformer)(
        pretrain_img_size=size,
        window_size=window,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
    )
    model.detector.in_features = ["p1", "p2", "p3"]
    return model


def _with_5_scales(model):
    model = copy.deepcopy(model)
    model.detector.backbone.out_indices = (0, 1, 2, 3)
    model.detector.in_features = ["p0", "p1", "p2", "p3"]
    model.detector.num_levels = 5
    return model


tiny_224 = _with_swin(224, 7, 96, (2, 2, 6, 2), (3, 6, 12, 24))
small_224 = _with_swin(224, 7, 96, (2, 2, 18, 2), (3, 6, 12, 24))
base_384 = _with_swin(384, 12, 128, (2, 2, 18, 2), (4, 8, 16, 32))
large_224 = _with_swin(224, 7, 192, (2, 2, 18, 2), (6, 12, 24, 48))
large_384 = _with_swin(384, 12, 192, (2, 2, 18, 2), (6, 12, 24, 48))

tiny_224_5scale = _with_5_scales(tiny_224)
small_224_5scale = _with_5_scales(small_224)
base_384_5scale = _with_5_scales(base_384)
large_384_5scale = _with_5_scales(large_384)

TINY_224 = f"{_RELEASES}/swin_tiny_patch4_window7_224.pth"
SMALL_224 = f"{_RELEASES}/swin_small_patch4_window7_224.pth"
BASE_384 = f"{_RELEASES}/swin_base_patch4_window12_384_22k.pth"
LARGE_224 = f"{_RELEASES}/swin_large_patch4_window7_224_22k.pth"
LARGE_384 = f"{_RELEASES}/swin_large_patch4_window12_384_22k.pth"
