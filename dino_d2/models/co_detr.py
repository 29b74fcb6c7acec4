"""Co-DETR (Zong et al., ICCV 2023): any detector here, trained together with auxiliary heads."""

from collections.abc import Mapping, Sequence

from torch import nn

from ..co_heads import CO_HEADS, CoHead, CoHeads, MemoryPyramid, PositiveQueries, adapted_strides
from ..losses import Criterion, FederatedClasses, HungarianMatcher
from ..transformer import GivenPositions, ReferencePointQueries
from .deformable_detr import EPS, build_deformable_detr
from .detr import DETR
from .dino import build_dino

HEADS = ("faster_rcnn", "atss")


def build_co_detr(
    base: DETR,
    co_heads: Sequence[str] | Mapping[str, Mapping | None] = HEADS,
    co_head_weights: Mapping[str, float] | None = None,
    co_head_weight: float = 2.0,
    query_weight: float = 1.0,
    num_finer: int = 0,
    num_coarser: int = 1,
    fewest_queries: int = 9,
    most_queries: int = 300,
    pad_with_negatives: bool = True,
    head_embed_per_channel: bool = False,
    one_pass: bool | None = None,
    num_classes: int | None = None,
) -> DETR:
    """Put co-heads on a detector, in place, and return it.

    Args:
        base: with a single or several scales, for example of `build_co_dino_base`.
        co_heads: K of them, by their names in `CO_HEADS`; as a mapping, with the options of each,
            where None leaves a head out. Without any the detector stays as it is.
        co_head_weights: factors of single heads' losses, 1 where not given.
        co_head_weight: of all heads' losses (lambda 2), relative to the sum over decoder layers.
        query_weight: of the losses of positive queries (lambda 1).
        num_finer, num_coarser: levels that the heads have beyond those of the encoder. An encoder
            of a single scale usually takes 2 and 2.
        fewest_queries, most_queries, pad_with_negatives: see `PositiveQueries`.
        head_embed_per_channel: see `PositiveQueries`.
        one_pass: see `CoHeads`; by default wherever queries have boxes, as it is a little faster.
        num_classes: those of the base, so that configs name them where those of other detectors do.

    Raises:
        ValueError: no co-head of such a name, options it does not take, a base with another number
            of classes, or one that starts from points with `one_pass`.
    """
    if num_classes not in (None, base.num_classes):
        raise ValueError(f"num_classes is {num_classes}, but the base has {base.num_classes}")
    if not isinstance(co_heads, Mapping):
        co_heads = {name: {} for name in co_heads}
    co_heads = {name: options for name, options in co_heads.items() if options is not None}
    if not co_heads:
        return base
    from_points = isinstance(base.query_source, ReferencePointQueries)
    if one_pass and from_points:
        raise ValueError("one_pass needs queries with boxes: this detector starts from points")
    weights = dict(co_head_weights or {})
    unknown = [name for name in weights if name not in co_heads]
    if unknown:
        raise ValueError(f"co_head_weights for {unknown}, but the heads are {list(co_heads)}")
    embed_dim = base.neck.embed_dim
    strides = adapted_strides(_strides(base), num_finer, num_coarser)
    given_positions = isinstance(base.decoder.placement, GivenPositions)
    common = co_head_weight * len(base.decoder.layers)
    base.co_heads = CoHeads(
        MemoryPyramid(embed_dim, num_finer, num_coarser),
        {
            name: _make_head(name, options, embed_dim, base.num_classes, strides)
            for name, options in co_heads.items()
        },
        {
            name: PositiveQueries(
                embed_dim,
                given_positions,
                use_features=given_positions,
                fewest=fewest_queries,
                most=most_queries,
                pad_with_negatives=pad_with_negatives,
                embed_per_channel=head_embed_per_channel,
            )
            for name in co_heads
        },
        {name: common * weights.get(name, 1.0) for name in co_heads},
        query_weight,
        not from_points if one_pass is None else one_pass,
    )
    return base


def build_co_dino_base(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    num_levels: int = 5,
    num_queries: int = 900,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    denoising_queries: int = 200,
    box_noise: float = 1.0,
    project: bool = True,
    federated: FederatedClasses | None = None,
) -> DETR:
    """DINO as Co-DETR trains it; for the arguments see `build_dino`.

    Every decoder layer has its own heads, and scores are to be the quality of the boxes.

    Args:
        federated: for LVIS, see `Criterion`.
    """
    return build_dino(
        backbone,
        in_features,
        num_classes,
        num_levels,
        num_queries,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        denoising_queries=denoising_queries,
        box_noise=box_noise,
        project=project,
        share_heads=False,
        neck_bias=False,
        matcher=HungarianMatcher(giou_eps=EPS),
        criterion=Criterion(quality=True, giou_eps=EPS, federated=federated),
    )


def build_co_deformable_base(
    backbone: nn.Module,
    in_features: Sequence[str],
    num_classes: int = 80,
    num_levels: int = 4,
    num_queries: int = 300,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
) -> DETR:
    """Two-stage Deformable DETR as Co-DETR trains it ("Deformable-DETR++"); for the arguments see
    `build_deformable_detr`.
    """
    return build_deformable_detr(
        backbone,
        in_features,
        num_classes,
        num_levels,
        num_queries,
        ffn_dim=2048,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        box_refinement=True,
        two_stage=True,
        mixed_selection=True,
        look_forward_twice=True,
        neck_bias=False,
    )


def _make_head(
    name: str, options: Mapping, embed_dim: int, num_classes: int, strides: list[int]
) -> CoHead:
    if name not in CO_HEADS:
        raise ValueError(f"no co-head {name!r}; there are {sorted(CO_HEADS)}")
    try:
        return CO_HEADS[name](embed_dim, num_classes, strides, **options)
    except TypeError as error:
        raise ValueError(f"co-head {name!r}: {error}") from error


def _strides(detector: DETR) -> list[int]:
    """Of the memory's levels, in pixels."""
    shapes = detector.backbone.output_shape()
    strides = [shapes[name].stride for name in detector.neck.in_features]
    extra = len(detector.neck.projections) - len(strides)
    return adapted_strides(strides, 0, extra)
