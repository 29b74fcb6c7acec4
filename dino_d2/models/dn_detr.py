"""DN-DETR (Li et al., CVPR 2022): DAB-DETR with denoising training."""

from collections.abc import Sequence

from torch import nn

from ..transformer import Denoising
from .dab_detr import build_dab_deformable_detr, build_dab_detr
from .detr import DETR


def build_dn_detr(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    embed_dim: int = 256,
    deformable: bool = False,
    denoising_groups: int = 5,
    label_noise: float = 0.2,
    center_noise: float = 0.4,
    size_noise: float = 0.4,
    hide_empty: bool = False,
    **options,
) -> DETR:
    """DN-DETR with the published settings as defaults.

    Args:
        backbone, in_features, num_classes, embed_dim: see `build_dab_detr`.
        deformable: take the deformable form of DAB-DETR.
        denoising_groups: how often an image's objects are noised; 0 trains without denoising.
        label_noise, hide_empty: see `Denoising`.
        center_noise, size_noise: lambda1 and lambda2 of the paper.
        options: further arguments of `build_dab_detr` or `build_dab_deformable_detr`.
    """
    denoising = None
    if denoising_groups:
        denoising = Denoising(
            num_classes,
            embed_dim,
            num_groups=denoising_groups,
            label_noise=label_noise,
            box_noise=(center_noise, size_noise),
            indicator=True,
            hide_empty=hide_empty,
        )
    build = build_dab_deformable_detr if deformable else build_dab_detr
    own = {"indicator": True} if deformable else {"query_content": "shared"}
    return build(
        backbone,
        in_features,
        num_classes=num_classes,
        embed_dim=embed_dim,
        denoising=denoising,
        **own,
        **options,
    )
