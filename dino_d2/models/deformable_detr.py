"""Deformable DETR (Zhu et al., ICLR 2021)."""

from collections.abc import Sequence

from torch import nn

from ..heads import Heads, make_box_head, make_class_head
from ..layers import SinePositionEncoding, repeat
from ..losses import Criterion, HungarianMatcher
from ..transformer import (
    Decoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    GivenPositions,
    Neck,
    ReferencePointQueries,
    TwoStageQueries,
)
from .detr import DETR, feature_channels

EPS = 1e-12  # the official generalised IoU has none in its denominators


def build_deformable_detr(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    num_levels: int = 4,
    num_queries: int = 300,
    embed_dim: int = 256,
    num_heads: int = 8,
    num_points: int = 4,
    ffn_dim: int = 1024,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    box_refinement: bool = False,
    two_stage: bool = False,
    mixed_selection: bool = False,
    look_forward_twice: bool = False,
    reference_eps: float = 1e-5,
    neck_bias: bool = True,
    matcher: HungarianMatcher | None = None,
    criterion: Criterion | None = None,
) -> DETR:
    """Deformable DETR with the published settings as defaults.

    Args:
        backbone: returns a dict of feature maps by name, and describes them by `output_shape()`.
        in_features: names of the maps to use, finest first.
        num_classes: K; the one place where it is set.
        num_levels: feature levels; those beyond `in_features` are added.
        box_refinement: layers hand on their boxes, and have heads of their own.
        two_stage: queries come from the encoder's best tokens; needs `box_refinement`.
        mixed_selection: two-stage queries take only their positions from tokens, and have learned
            content (DINO, sec. 3.4).
        look_forward_twice: whether a box's loss also trains the layer before (DINO, sec. 3.5).
        reference_eps: no reference lies closer to 0 or 1 when its box is refined (detrex: 1e-3).
        neck_bias: whether the neck's convolutions have one (not in Co-DETR).
        matcher, criterion: published costs and weights by default.

    Raises:
        ValueError: two_stage without box_refinement, mixed_selection without two_stage.
    """
    if two_stage and not box_refinement:
        raise ValueError("two_stage needs box_refinement: its queries start from boxes")
    if mixed_selection and not two_stage:
        raise ValueError("mixed_selection needs two_stage: it mixes proposals with learned content")
    encoding = SinePositionEncoding(embed_dim, temperature=10000, offset=-0.5)
    channels = feature_channels(backbone, in_features)
    attention = (embed_dim, num_heads, num_levels, num_points, ffn_dim)
    heads = Heads(
        embed_dim,
        num_classes,
        decoder_layers,
        shared=not box_refinement,
        size_bias=0.0 if two_stage else -2.0,  # points start as boxes of a tenth of the image
        eps=reference_eps,
    )
    if two_stage:
        class_head, box_head = make_class_head(embed_dim, num_classes), make_box_head(embed_dim)
        content = "learned" if mixed_selection else "box"
        query_source = TwoStageQueries(num_queries, embed_dim, class_head, box_head, content)
    else:
        query_source = ReferencePointQueries(num_queries, embed_dim)
    return DETR(
        backbone=backbone,
        neck=Neck(in_features, channels, embed_dim, num_levels, encoding, bias=neck_bias),
        encoder=DeformableEncoder(encoder_layers, *attention),
        query_source=query_source,
        decoder=Decoder(
            repeat(DeformableDecoderLayer(*attention), decoder_layers),
            GivenPositions(),
            norm=None,
            look_forward_twice=look_forward_twice,
            refine=box_refinement,
        ),
        heads=heads,
        denoising=None,
        matcher=matcher or HungarianMatcher(giou_eps=EPS),
        criterion=criterion or Criterion(class_weight=2.0, giou_eps=EPS),
    )
