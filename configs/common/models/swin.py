"""Detectron2's Swin transformers, and where their ImageNet weights are."""

from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

_RELEASES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
TINY_224 = f"{_RELEASES}/swin_tiny_patch4_window7_224.pth"
SMALL_224 = f"{_RELEASES}/swin_small_patch4_window7_224.pth"
BASE_384 = f"{_RELEASES}/swin_base_patch4_window12_384_22k.pth"
LARGE_224 = f"{_RELEASES}/swin_large_patch4_window7_224_22k.pth"
LARGE_384 = f"{_RELEASES}/swin_large_patch4_window12_384_22k.pth"


def _swin(size, window, embed_dim, depths, num_heads):
    return L(SwinTransformer)(
        pretrain_img_size=size,
        window_size=window,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
    )


swin_tiny_224 = _swin(224, 7, 96, (2, 2, 6, 2), (3, 6, 12, 24))
swin_small_224 = _swin(224, 7, 96, (2, 2, 18, 2), (3, 6, 12, 24))
swin_base_384 = _swin(384, 12, 128, (2, 2, 18, 2), (4, 8, 16, 32))
swin_large_224 = _swin(224, 7, 192, (2, 2, 18, 2), (6, 12, 24, 48))
swin_large_384 = _swin(384, 12, 192, (2, 2, 18, 2), (6, 12, 24, 48))
