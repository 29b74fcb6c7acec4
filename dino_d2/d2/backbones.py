"""Detectron2 backbones that take more than one call to build."""

from collections.abc import Sequence
from functools import partial

from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone import BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn


class ViTDet(SimpleFeaturePyramid):
    """Detectron2's, but says that images are to be padded: a misspelt name keeps that to itself.

    The patches would leave out up to 15 pixels at the right and at the bottom.
    """

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride of the pyramid."""
        return self._size_divisibility


def build_vitdet(
    embed_dim: int,
    depth: int,
    num_heads: int,
    drop_path: float,
    global_blocks: Sequence[int],
    image_size: int = 1024,
    scale_factors: Sequence[float] = (2.0, 1.0, 0.5),
) -> ViTDet:
    """A plain ViT with a simple feature pyramid, as ViTDet (Li et al., ECCV 2022).

    Args:
        embed_dim, depth, num_heads: of the ViT with patches of 16 pixels.
        drop_path: stochastic depth rate.
        global_blocks: blocks that attend to the whole image; the others to windows of 14.
        image_size: for which position embeddings are sized; other sizes interpolate them.
        scale_factors: of the pyramid's maps to the ViT's stride of 16. A map of half the coarsest
            resolution follows: (2, 1, 0.5) returns p3, p4, p5 and p6, with 256 channels.
    """
    net = ViT(
        img_size=image_size,
        patch_size=16,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path,
        window_size=14,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[i for i in range(depth) if i not in global_blocks],
        use_rel_pos=True,
        out_feature="last_feat",
    )
    return ViTDet(
        net,
        in_feature="last_feat",
        out_channels=256,
        scale_factors=tuple(scale_factors),
        top_block=LastLevelMaxPool(),
        norm="LN",
    )


def build_resnet_dc5(depth: int, freeze_at: int = 2) -> ResNet:
    """A ResNet of 50 or 101 layers whose last stage, "res5", keeps a stride of 16 by dilation.

    As torchvision's `replace_stride_with_dilation`, with which published weights were trained: the
    stage's first block is not dilated, unlike with Detectron2's RES5_DILATION.
    """
    common = {"norm": "FrozenBN", "stride_in_1x1": False}
    stages = ResNet.make_default_stages(depth, **common)
    stages[-1] = ResNet.make_stage(
        BottleneckBlock,
        3,
        stride_per_block=[1, 1, 1],
        dilation_per_block=[1, 2, 2],
        in_channels=1024,
        out_channels=2048,
        bottleneck_channels=512,
        num_groups=1,
        **common,
    )
    stem = BasicStem(in_channels=3, out_channels=64, norm="FrozenBN")
    return ResNet(stem, stages, out_features=["res5"], freeze_at=freeze_at)
