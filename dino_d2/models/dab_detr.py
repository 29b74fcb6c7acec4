"""DAB-DETR (Liu et al., ICLR 2022) and DN-DETR (Li et al., CVPR 2022): queries are anchor boxes.

Each has a dense form on one feature map and a deformable form on four.
"""

from collections.abc import Sequence

from torch import nn

from ..heads import Heads, make_box_head, make_class_head
from ..layers import SinePositionEncoding, repeat
from ..losses import Criterion, HungarianMatcher
from ..transformer import (
    BoxPositions,
    ConditionalPositions,
    Decoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    Denoising,
    DenseEncoder,
    LearnedQueries,
    Neck,
    QuerySelection,
    conditional_layers,
)
from .detr import DETR, feature_channels


def build_dab_detr(
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
    query_content: str = "zero",
    anchor_temperature: float = 10000,
    denoising: Denoising | None = None,
    matcher: HungarianMatcher | None = None,
    criterion: Criterion | None = None,
) -> DETR:
    """DAB-DETR with the published settings as defaults.

    Args:
        backbone: returns a dict of feature maps by name, and describes them by `output_shape()`.
        in_features: names of the maps to use, finest first; the last one for the dense form.
        num_classes: K; the one place where it is set.
        num_levels: 1 attends densely. More take a deformable encoder, and a decoder that attends
            densely to every level (DN-DETR's "deformable encoder only").
        num_patterns: see `LearnedQueries`; with patterns there are that many times `num_queries`.
        activation: of the dense layers, "prelu" or "relu".
        query_content: "zero" (DAB-DETR), or "shared" and told from denoising queries (DN-DETR).
        anchor_temperature: of the anchors' encoding. Published weights need 10000; in the paper it
            is 20, as of the image's encoding, and small models learn sooner with it.
        denoising: queries made from objects, in training.
        matcher, criterion: published costs and weights by default.
    """
    dense = num_levels == 1
    encoding = SinePositionEncoding(embed_dim, temperature=20)
    channels = feature_channels(backbone, in_features)
    if dense:
        encoder = DenseEncoder(encoder_layers, embed_dim, num_heads, ffn_dim, activation)
    else:
        encoder = DeformableEncoder(
            encoder_layers, embed_dim, num_heads, num_levels, num_points, ffn_dim
        )
    layers = conditional_layers(
        decoder_layers, embed_dim, num_heads, num_levels, ffn_dim, activation
    )
    indicator = query_content == "shared"
    placement = ConditionalPositions(embed_dim, anchor_temperature)
    detector = DETR(
        backbone=backbone,
        neck=Neck(in_features, channels, embed_dim, num_levels, encoding, norm=not dense),
        encoder=encoder,
        query_source=LearnedQueries(num_queries, embed_dim, query_content, indicator, num_patterns),
        decoder=Decoder(layers, placement, nn.LayerNorm(embed_dim), look_forward_twice=True),
        heads=Heads(embed_dim, num_classes, decoder_layers, shared=True),
        denoising=denoising,
        matcher=matcher or HungarianMatcher(),
        criterion=criterion or Criterion(),
    )
    _start_as_published(detector, dense)
    return detector


def build_dab_deformable_detr(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    num_levels: int = 4,
    num_queries: int = 300,
    num_patterns: int = 0,
    embed_dim: int = 256,
    num_heads: int = 8,
    num_points: int = 4,
    ffn_dim: int = 2048,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    indicator: bool = False,
    two_stage: bool = False,
    padding_invariant: bool = False,
    denoising: Denoising | None = None,
    matcher: HungarianMatcher | None = None,
    criterion: Criterion | None = None,
) -> DETR:
    """DAB-Deformable-DETR with the published settings as defaults.

    Args:
        indicator: see `LearnedQueries`.
        two_stage: queries, their content too, come from the encoder's best tokens (detrex).
        padding_invariant: see `build_dino`.

    Other arguments are those of `build_dab_detr`.

    Raises:
        ValueError: two_stage with patterns or an indicator, which learned content has.
    """
    if two_stage and (num_patterns or indicator):
        raise ValueError("two_stage takes content from the encoder: no patterns, no denoising")
    encoding = SinePositionEncoding(embed_dim, temperature=10000, offset=-0.5)
    channels = feature_channels(backbone, in_features)
    attention = (embed_dim, num_heads, num_levels, num_points, ffn_dim)
    placement = BoxPositions(embed_dim, scaled=True, padded=not padding_invariant)
    if two_stage:
        proposal_heads = make_class_head(embed_dim, num_classes), make_box_head(embed_dim)
        query_source = QuerySelection(
            num_queries, embed_dim, *proposal_heads, "memory", padding_invariant
        )
    else:
        query_source = LearnedQueries(num_queries, embed_dim, "each", indicator, num_patterns)
    size_bias = 0.0 if two_stage else -2.0
    return DETR(
        backbone=backbone,
        neck=Neck(in_features, channels, embed_dim, num_levels, encoding),
        encoder=DeformableEncoder(encoder_layers, *attention),
        query_source=query_source,
        decoder=Decoder(
            repeat(DeformableDecoderLayer(*attention), decoder_layers),
            placement,
            norm=None,
            look_forward_twice=False,
        ),
        heads=Heads(embed_dim, num_classes, decoder_layers, shared=False, size_bias=size_bias),
        denoising=denoising,
        matcher=matcher or HungarianMatcher(),
        criterion=criterion or Criterion(),
    )


def _start_as_published(detector: DETR, dense: bool) -> None:
    """Where the official code starts otherwise than its relatives.

    Projections start as convolutions do. With a deformable encoder, deformable attention and
    patterns start like every other weight, and boxes not where the anchors are.
    """
    for convolution, *_ in detector.neck.projections:
        convolution.reset_parameters()
    if dense:
        return
    detector.heads.box_heads[0].layers[-1].reset_parameters()
    weights = [layer.attention.sampling_offsets.weight for layer in detector.encoder.layers]
    weights += [layer.attention.attention_weights.weight for layer in detector.encoder.layers]
    if detector.query_source.patterns is not None:
        weights.append(detector.query_source.patterns)
    for weight in weights:
        nn.init.xavier_uniform_(weight)
