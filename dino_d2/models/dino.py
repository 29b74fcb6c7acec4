"""DINO (Zhang et al., ICLR 2023), assembled from the parts."""

import copy
from collections.abc import Sequence

from torch import nn

from ..heads import Heads
from ..layers import SinePositionEncoding
from ..losses import Criterion, HungarianMatcher
from ..transformer import (
    ContrastiveDenoising,
    Decoder,
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
    denoising_queries: int | None = 200,
    denoising_groups: int | None = None,
    label_noise: float = 0.25,
    box_noise: float = 1.0,
    share_heads: bool = True,
    position_temperature: float = 20,
    position_offset: float = 0.0,
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
        padding_invariant: True makes the predictions of an image the same whatever it is padded to.
            As published they are not: positional queries are relative to the padded map, and
            padding may become a query. Without padding, as in evaluation one image at a time, both
            are the same.
        denoising: "cdn" (contrastive, DINO), "dn" (DN-DETR) or None.
        denoising_queries, denoising_groups: how many; give one, see `Denoising`.
        label_noise, box_noise: see `Denoising`.
        share_heads: one class and one box head for all decoder layers (official), or one pair each
            (detrex).
        position_temperature, position_offset: of the image's position encoding.
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
        neck=Neck(in_features, channels, embed_dim, num_levels, encoding),
        encoder=DeformableEncoder(encoder_layers, *attention),
        query_source=_make_query_source(
            query_selection, num_queries, embed_dim, heads, padding_invariant
        ),
        decoder=Decoder(decoder_layers, *attention, look_forward_twice, not padding_invariant),
        heads=heads,
        denoising=_make_denoising(
            denoising,
            num_classes,
            embed_dim,
            denoising_queries if denoising_groups is None else None,
            denoising_groups,
            label_noise,
            box_noise,
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


def _make_denoising(kind: str | None, *settings) -> Denoising | None:
    kinds = {"cdn": ContrastiveDenoising, "dn": Denoising}
    if kind is None:
        return None
    if kind not in kinds:
        raise ValueError(f"denoising must be in {[*kinds, None]}, not {kind!r}")
    return kinds[kind](*settings)
