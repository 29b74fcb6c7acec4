"""DN-DETR (Li et al., CVPR 2022): DAB-DETR with denoising training."""

from collections.abc import Sequence

from torch import nn

from ..losses import Criterion, HungarianMatcher
from ..transformer import Denoising
from .dab_detr import build_dab_deformable_detr, build_dab_detr
from .detr import DETR


def build_dn_detr(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    num_levels: int = 1,
    num_queries: int = 300,
    num_patterns: int = 0,
    embed_dim: int = 256,
    num_heads: int = 8,
    num_points: int = 4,
    ffn_dim: int = 2048,
    activation: str = "prelu",
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    deformable: bool = False,
    padding_invariant: bool = False,
    anchor_temperature: float = 10000,
    denoising_groups: int = 5,
    label_noise: float = 0.2,
    center_noise: float = 0.4,
    size_noise: float = 0.4,
    hide_empty: bool = False,
    matcher: HungarianMatcher | None = None,
    criterion: Criterion | None = None,
) -> DETR:
    """DN-DETR with the published settings as defaults.

    Args:
        deformable: take `build_dab_deformable_detr`, whose published `num_levels` are 4.
        padding_invariant: of the deformable form, see `build_dino`.
        anchor_temperature: of the other forms.
        denoising_groups: how often an image's objects are noised; 0 trains without denoising.
        label_noise, hide_empty: see `Denoising`.
        center_noise, size_noise: lambda1 and lambda2 of the paper.

    Other arguments are those of `build_dab_detr`.
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
    sizes = (num_levels, num_queries, num_patterns, embed_dim, num_heads, num_points, ffn_dim)
    common = (backbone, in_features, num_classes, *sizes)
    rest = {
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "denoising": denoising,
        "matcher": matcher,
        "criterion": criterion,
    }
    if deformable:
        own = {"indicator": True, "padding_invariant": padding_invariant}
        return build_dab_deformable_detr(*common, **own, **rest)
    own = {"query_content": "shared", "anchor_temperature": anchor_temperature}
    return build_dab_detr(*common, activation=activation, **own, **rest)
