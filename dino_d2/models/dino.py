"""DINO (Zhang et al., ICLR 2023), assembled from the parts."""

import copy
from collections.abc import Sequence

from torch import nn

from ..heads import Heads
from ..layers import SinePositionEncoding, repeat
from ..losses import Criterion, HungarianMatcher
from ..transformer import (
    BoxPositions,
    ContrastiveDenoising,
    Decoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    Denoising,
    LearnedQueries,
    Neck,
    QuerySelection,
)
from .detr import DETR, feature_channels

QUERY_SELECTIONS = ("static", "pure", "mixed")


def build_dino(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    num_levels: int = 4,
    num_queries: int = 900,
    embed_dim: int = 256,
    num_heads: int = 8,
    num_points: int = 4,
    ffn_dim: int = 2048,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    query_selection: str = "mixed",
    look_forward_twice: bool = True,
    padding_invariant: bool = False,
    denoising: str | None = "cdn",
    denoising_queries: int | None = None,
    denoising_groups: int | None = None,
    label_noise: float | None = None,
    box_noise: float | None = None,
    share_heads: bool = True,
    position_temperature: float = 20,
    position_offset: float = 0.0,
    project: bool = True,
    neck_bias: bool = True,
    matcher: HungarianMatcher | None = None,
    criterion: Criterion | None = None,
) -> DETR:
    """DINO with the published settings as defaults.

    Args:
        backbone: returns a dict of feature maps by name, and describes them by `output_shape()`.
        in_features: names of the maps to use, finest first: the last three for the 4-scale model,
            all four for the 5-scale one.
        num_classes: K; the one place where it is set.
        num_levels: feature levels of the transformer; those beyond `in_features` are added.
        query_selection: "mixed" (DINO), "pure" (content from the encoder too) or "static" (all
            learned, no proposals).
        look_forward_twice: whether a box's loss also trains the layer before.
        padding_invariant: True makes the encoder, the queries and the decoder give the same for a
            pyramid whatever it is padded to. As published they do not: positional queries are
            relative to the padded map, and padding may become a query. The neck's GroupNorm sees
            padding either way. Without padding, as in evaluation one image at a time, both are the
            same.
        denoising: "cdn" (contrastive, DINO), "dn" (DN-DETR) or None.
        denoising_queries, denoising_groups: how many; give at most one, see `Denoising`. By default
            200 queries.
        label_noise, box_noise: see `Denoising`. By default 0.25 and 1.0 (DINO), for "dn" 0.2 and
            0.4 (DN-DETR).
        share_heads: one class and one box head for all decoder layers (official), or one pair each
            (detrex).
        position_temperature, position_offset: of the image's position encoding.
        project: False takes the features as they are, see `Neck`.
        neck_bias: whether the neck's convolutions have one (not in Co-DETR).
        matcher, criterion: published costs and weights by default.

    Raises:
        ValueError: an unknown choice, or the backbone lacks one of the maps.
    """
    if query_selection not in QUERY_SELECTIONS:
        raise ValueError(f"query_selection must be in {QUERY_SELECTIONS}, not {query_selection!r}")
    encoding = SinePositionEncoding(embed_dim, position_temperature, position_offset)
    channels = feature_channels(backbone, in_features)
    heads = Heads(embed_dim, num_classes, decoder_layers, share_heads)
    attention = (embed_dim, num_heads, num_levels, num_points, ffn_dim)
    return DETR(
        backbone=backbone,
        neck=Neck(
            in_features, channels, embed_dim, num_levels, encoding, bias=neck_bias, project=project
        ),
        encoder=DeformableEncoder(encoder_layers, *attention),
        query_source=_make_query_source(
            query_selection, num_queries, embed_dim, heads, padding_invariant
        ),
        decoder=Decoder(
            repeat(DeformableDecoderLayer(*attention), decoder_layers),
            BoxPositions(embed_dim, padded=not padding_invariant),
            nn.LayerNorm(embed_dim),
            look_forward_twice,
        ),
        heads=heads,
        denoising=_make_denoising(
            denoising,
            num_classes,
            embed_dim,
            num_queries=200 if denoising_queries is denoising_groups is None else denoising_queries,
            num_groups=denoising_groups,
            label_noise=label_noise,
            box_noise=box_noise,
        ),
        matcher=matcher or HungarianMatcher(),
        criterion=criterion or Criterion(),
    )


def _make_query_source(
    selection: str, num_queries: int, embed_dim: int, heads: Heads, padding_last: bool
) -> nn.Module:
    if selection == "static":
        return LearnedQueries(num_queries, embed_dim)
    # The proposals have heads of their own, which start equal to the decoder's.
    class_head, box_head = copy.deepcopy(heads.class_heads[0]), copy.deepcopy(heads.box_heads[0])
    content = "learned" if selection == "mixed" else "memory"
    return QuerySelection(num_queries, embed_dim, class_head, box_head, content, padding_last)


def _make_denoising(
    kind: str | None,
    num_classes: int,
    embed_dim: int,
    num_queries: int | None,
    num_groups: int | None,
    label_noise: float | None,
    box_noise: float | None,
) -> Denoising | None:
    kinds = {"cdn": (ContrastiveDenoising, 0.25, 1.0), "dn": (Denoising, 0.2, 0.4)}
    if kind is None:
        return None
    if kind not in kinds:
        raise ValueError(f"denoising must be in {[*kinds, None]}, not {kind!r}")
    make, usual_label_noise, usual_box_noise = kinds[kind]
    return make(
        num_classes,
        embed_dim,
        num_queries,
        num_groups,
        label_noise=usual_label_noise if label_noise is None else label_noise,
        box_noise=usual_box_noise if box_noise is None else box_noise,
    )
