"""What other repositories call the weights of our models.

A table is a list of (their name, our name). `#` stands for a number and `*` for any rest; they are
carried over in order. The first row that matches counts. A weight that means nothing here is
dropped by the name None. A name without a row is an error, so that nothing gets lost unseen.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from .io import CheckpointError

Table = list[tuple[str, str | None]]

_BACKBONE: Table = [("backbone.0.*", "backbone.*")]

# EVA-02's authors name blocks unlike timm, whose parts are ours; Co-DETR keeps to the authors.
EVA02_BLOCKS: Table = [
    *((f"blocks.#.{norm}.*", f"net.blocks.#.{norm}.*") for norm in ("norm1", "norm2")),
    *((f"blocks.#.attn.{x}_bias", f"net.blocks.#.attn.{x}_proj.bias") for x in ("q", "v")),
    *((f"blocks.#.attn.{x}.*", f"net.blocks.#.attn.{x}.*") for x in ("q_proj", "k_proj", "v_proj")),
    ("blocks.#.attn.proj.*", "net.blocks.#.attn.proj.*"),
    ("blocks.#.attn.rope.*", None),
    ("blocks.#.mlp.w1.*", "net.blocks.#.mlp.fc1_g.*"),
    ("blocks.#.mlp.w2.*", "net.blocks.#.mlp.fc1_x.*"),
    ("blocks.#.mlp.ffn_ln.*", "net.blocks.#.mlp.norm.*"),
    ("blocks.#.mlp.w3.*", "net.blocks.#.mlp.fc2.*"),
    ("patch_embed.*", "net.patch_embed.*"),
    ("pos_embed", "net.pos_embed"),
]
# Sense-X/Co-DETR's ViT-L with its pyramid -> `dino_d2.backbones.build_eva02`
CO_DETR_EVA02: Table = [
    *((f"backbone.{theirs}", ours and f"backbone.{ours}") for theirs, ours in EVA02_BLOCKS),
    ("backbone.out_norm.*", "backbone.net.out_norm.*"),
    ("backbone.rope_win.*", None),
    ("backbone.rope_glb.*", None),
    ("neck.p#.*", "backbone.p#.*"),
]

# Official encoders and decoders, each by its kind of layers.
_DEFORMABLE_ENCODER: Table = [
    ("input_proj.#.#.*", "neck.projections.#.#.*"),
    ("transformer.level_embed", "encoder.level_embed"),
    ("transformer.encoder.layers.#.self_attn.*", "encoder.layers.#.attention.*"),
    ("transformer.encoder.layers.#.norm1.*", "encoder.layers.#.attention_norm.*"),
    ("transformer.encoder.layers.#.linear#.*", "encoder.layers.#.ffn.linear#.*"),
    ("transformer.encoder.layers.#.norm2.*", "encoder.layers.#.ffn.norm.*"),
]
_DENSE_ENCODER: Table = [
    ("input_proj.weight", "neck.projections.0.0.weight"),
    ("input_proj.bias", "neck.projections.0.0.bias"),
    ("transformer.encoder.query_scale.*", "encoder.scale.*"),
    ("transformer.encoder.layers.#.activation.*", "encoder.layers.#.ffn.activation.*"),
]
_PROPOSALS: Table = [
    ("transformer.enc_output.*", "query_source.project.*"),
    ("transformer.enc_output_norm.*", "query_source.norm.*"),
]
_DEFORMABLE_DECODER: Table = [
    ("transformer.decoder.layers.#.self_attn.*", "decoder.layers.#.self_attention.*"),
    ("transformer.decoder.layers.#.norm2.*", "decoder.layers.#.self_attention_norm.*"),
    ("transformer.decoder.layers.#.cross_attn.*", "decoder.layers.#.cross_attention.*"),
    ("transformer.decoder.layers.#.norm1.*", "decoder.layers.#.cross_attention_norm.*"),
]
_CONDITIONAL_DECODER: Table = [
    (
        "transformer.decoder.layers.#.self_attn.out_proj.*",
        "decoder.layers.#.self_attention.output.*",
    ),
    ("transformer.decoder.layers.#.norm1.*", "decoder.layers.#.self_attention_norm.*"),
    (
        "transformer.decoder.layers.#.cross_attn.out_proj.*",
        "decoder.layers.#.cross_attention.output.*",
    ),
    ("transformer.decoder.layers.#.ca_out_v_proj.*", "decoder.layers.#.cross_attention.output.*"),
    ("transformer.decoder.layers.#.lvl_attn.*", "decoder.layers.#.level.*"),
    ("transformer.decoder.layers.#.norm2.*", "decoder.layers.#.cross_attention_norm.*"),
    ("transformer.decoder.layers.#.activation.*", "decoder.layers.#.ffn.activation.*"),
    *(
        (
            f"transformer.decoder.layers.#.{short}_{theirs}_proj.*",
            f"decoder.layers.#.{long}.{ours}.*",
        )
        for short, long in (("sa", "self_attention"), ("ca", "cross_attention"))
        for theirs, ours in (
            ("qcontent", "query_content"),
            ("qpos", "query_position"),
            ("kcontent", "key_content"),
            ("kpos", "key_position"),
            ("v", "value"),
            ("qpos_sine", "query_sine"),
        )
    ),
]
_PLACEMENT: Table = [
    ("transformer.decoder.norm.*", "decoder.norm.*"),
    ("transformer.decoder.ref_point_head.*", "decoder.placement.mlp.*"),
    ("transformer.decoder.query_scale.*", "decoder.placement.scale.*"),
    ("transformer.decoder.ref_anchor_head.*", "decoder.placement.size.*"),
]
_DECODER: Table = [
    ("transformer.decoder.layers.#.linear#.*", "decoder.layers.#.ffn.linear#.*"),
    ("transformer.decoder.layers.#.norm3.*", "decoder.layers.#.ffn.norm.*"),
    *_PLACEMENT,
]
_HEADS: Table = [
    ("transformer.decoder.class_embed.#.*", "heads.class_heads.#.*"),
    ("transformer.decoder.bbox_embed.#.*", "heads.box_heads.#.*"),
    ("class_embed.#.*", "heads.class_heads.#.*"),
    ("bbox_embed.#.*", "heads.box_heads.#.*"),
]
_SHARED_HEADS: Table = [
    ("transformer.decoder.bbox_embed.*", "heads.box_heads.0.*"),
    ("class_embed.*", "heads.class_heads.0.*"),
    ("bbox_embed.*", "heads.box_heads.0.*"),
]
_LEARNED_QUERIES: Table = [
    ("refpoint_embed.weight", "query_source.anchors"),
    ("anchor_box_embed.weight", "query_source.anchors"),
    ("tgt_embed.weight", "query_source.content"),
    ("patterns_embed.weight", "query_source.patterns"),
    ("transformer.patterns.weight", "query_source.patterns"),
]
_LABELS: Table = [("label_enc.weight", "denoising.label_embed.weight")]


# These hold two weights of ours; `split` takes them apart.
LABELS_AND_CONTENT = "denoising.labels_and_content"
POSITIONS_AND_CONTENT = "query_source.positions_and_content"
HEAD_EMBEDS = "co_heads.head_embeds:"  # a row for each head, whose names follow, joined by "+"

_PLACED_QUERIES: Table = [
    ("query_embed.weight", POSITIONS_AND_CONTENT),
    ("query_embedding.weight", POSITIONS_AND_CONTENT),
    ("transformer.reference_points.*", "query_source.reference.*"),
    ("transformer.pos_trans.*", "query_source.from_box.*"),
    ("transformer.pos_trans_norm.*", "query_source.from_box_norm.*"),
]


def official_dino(names: Iterable[str]) -> Table:
    """IDEA-Research/DINO"""
    return [
        *_BACKBONE,
        *_DEFORMABLE_ENCODER,
        *_PROPOSALS,
        ("transformer.enc_out_class_embed.*", "query_source.class_head.*"),
        ("transformer.enc_out_bbox_embed.*", "query_source.box_head.*"),
        ("transformer.tgt_embed.weight", "query_source.content"),
        *_DEFORMABLE_DECODER,
        *_DECODER,
        *_HEADS,
        *_LABELS,
    ]


def official_dab(names: Iterable[str]) -> Table:
    """IDEA-Research/DN-DETR and DAB-DETR, in all their forms"""
    dense_decoder = any("sa_qcontent_proj" in name for name in names)
    common = [*_BACKBONE, *_DENSE_ENCODER, *_DEFORMABLE_ENCODER, *_LEARNED_QUERIES]
    if not dense_decoder:
        return [*common, *_DEFORMABLE_DECODER, *_DECODER, *_HEADS, *_LABELS]
    labels = ("label_enc.weight", LABELS_AND_CONTENT)
    return [*common, *_CONDITIONAL_DECODER, *_DECODER, *_SHARED_HEADS, labels]


def official_deformable_detr(names: Iterable[str]) -> Table:
    """fundamentalvision/Deformable-DETR; two-stage weights count the proposals' heads as a layer"""
    return [
        *_BACKBONE,
        *_DEFORMABLE_ENCODER,
        *_PROPOSALS,
        *_PLACED_QUERIES,
        *_DEFORMABLE_DECODER,
        *_DECODER,
        *_heads(set(names)),
    ]


def split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take weights apart that hold two of ours."""
    result = dict(weights)
    if LABELS_AND_CONTENT in result:  # the last row is the content of ordinary queries
        rows = result.pop(LABELS_AND_CONTENT)
        result["denoising.label_embed.weight"] = rows[:-1]
        result["query_source.content"] = rows[-1:]
    if POSITIONS_AND_CONTENT in result:
        halves = result.pop(POSITIONS_AND_CONTENT).chunk(2, 1)
        result["query_source.positions"], result["query_source.content"] = halves
    for name in [name for name in result if name.startswith(HEAD_EMBEDS)]:
        heads = name.removeprefix(HEAD_EMBEDS).split("+")
        for head, row in zip(heads, result.pop(name), strict=True):
            result[f"co_heads.queries.{head}.head_embed"] = row
    return result


# detrex names layers by number, the same in all of its models.
_DETREX_LAYERS: Table = [
    ("backbone.*", "backbone.*"),
    ("transformer.encoder.layers.#.norms.0.*", "encoder.layers.#.attention_norm.*"),
    ("transformer.encoder.layers.#.norms.1.*", "encoder.layers.#.ffn.norm.*"),
    ("transformer.decoder.layers.#.norms.0.*", "decoder.layers.#.self_attention_norm.*"),
    ("transformer.decoder.layers.#.norms.1.*", "decoder.layers.#.cross_attention_norm.*"),
    ("transformer.decoder.layers.#.norms.2.*", "decoder.layers.#.ffn.norm.*"),
    *(
        (f"transformer.{part}.layers.#.ffns.0.{theirs}.*", f"{part}.layers.#.ffn.{ours}.*")
        for part in ("encoder", "decoder")
        for theirs, ours in (
            ("layers.0.0", "linear1"),
            ("layers.1", "linear2"),
            ("layers.0.1", "activation"),
            ("activation", "activation"),
        )
    ),
]
_DETREX_DEFORMABLE: Table = [
    *_DETREX_LAYERS,
    ("neck.convs.#.conv.*", "neck.projections.#.0.*"),
    ("neck.convs.#.norm.*", "neck.projections.#.1.*"),
    ("transformer.level_embeds", "encoder.level_embed"),
    ("transformer.encoder.layers.#.attentions.0.*", "encoder.layers.#.attention.*"),
    ("transformer.decoder.layers.#.attentions.0.attn.*", "decoder.layers.#.self_attention.*"),
    ("transformer.decoder.layers.#.attentions.1.*", "decoder.layers.#.cross_attention.*"),
    *_PROPOSALS,
    *_PLACEMENT,
]
_DETREX_DENSE: Table = [
    *_DETREX_LAYERS,
    ("input_proj.*", "neck.projections.0.0.*"),
    ("transformer.encoder.query_scale.*", "encoder.scale.*"),
    ("transformer.encoder.layers.#.attentions.0.attn.*", "encoder.layers.#.attention.*"),
    *(
        (
            f"transformer.decoder.layers.#.attentions.{index}.{theirs}_proj.*",
            f"decoder.layers.#.{attention}.{ours}.*",
        )
        for index, attention in enumerate(("self_attention", "cross_attention"))
        for theirs, ours in (
            ("query_content", "query_content"),
            ("query_pos", "query_position"),
            ("query_pos_sine", "query_sine"),
            ("key_content", "key_content"),
            ("key_pos", "key_position"),
            ("value", "value"),
            ("out", "output"),
        )
    ),
    ("transformer.decoder.post_norm_layer.*", "decoder.norm.*"),
    *_PLACEMENT,
]
# A file that detrex converted from the official one lacks the part's name.
_DETREX_LABELS = ("denoising_generator.label_encoder.weight", "label_encoder.weight")


def detrex_dino(names: Iterable[str]) -> Table:
    """detrex's DINO"""
    names = set(names)
    return [
        *_extra_levels(names),
        *_DETREX_DEFORMABLE,
        ("transformer.tgt_embed.weight", "query_source.content"),
        *_proposal_heads(names),
        *_HEADS,
        *_LABELS,
    ]


def detrex_dab(names: Iterable[str]) -> Table:
    """detrex's DAB-DETR and DN-DETR"""
    labels = [(name, LABELS_AND_CONTENT) for name in _DETREX_LABELS]
    return [*_DETREX_DENSE, *_LEARNED_QUERIES, *_SHARED_HEADS, *labels]


def detrex_dab_deformable(names: Iterable[str]) -> Table:
    """detrex's DAB-Deformable-DETR, two-stage or not, and DN-Deformable-DETR"""
    names = set(names)
    labels = [(name, "denoising.label_embed.weight") for name in _DETREX_LABELS]
    levels = _extra_levels(names)
    return [*levels, *_DETREX_DEFORMABLE, *_LEARNED_QUERIES, *_heads(names), *labels]


def detrex_deformable(names: Iterable[str]) -> Table:
    """detrex's Deformable DETR with box refinement, two-stage or not"""
    names = set(names)
    return [*_extra_levels(names), *_DETREX_DEFORMABLE, *_PLACED_QUERIES, *_heads(names)]


def detrex_plain_deformable(names: Iterable[str]) -> Table:
    """detrex's Deformable DETR without box refinement, whose heads are one under several names"""
    names = set(names)
    heads: Table = []
    for i in range(_count("class_embed.#.weight", names)):
        heads.append((f"class_embed.{i}.*", "heads.class_heads.0.*"))
        heads.append((f"bbox_embed.{i}.*", "heads.box_heads.0.*"))
    return [*heads, *detrex_deformable(names)]


_CO_DETR_TRANSFORMER: Table = [
    (f"query_head.{theirs}", ours)
    for theirs, ours in (*_DETREX_DEFORMABLE, *_PLACED_QUERIES)
    if theirs.startswith("transformer.")
]
_CO_HEADS: Table = [
    (theirs, f"co_heads.heads.{ours}")
    for theirs, ours in (
        ("rpn_head.rpn_conv.*", "faster_rcnn.proposals.conv.*"),
        ("rpn_head.rpn_cls.*", "faster_rcnn.proposals.class_head.*"),
        ("rpn_head.rpn_reg.*", "faster_rcnn.proposals.box_head.*"),
        ("roi_head.0.bbox_head.shared_convs.#.conv.*", "faster_rcnn.convs.#.0.*"),
        ("roi_head.0.bbox_head.shared_convs.#.gn.*", "faster_rcnn.convs.#.1.*"),
        ("roi_head.0.bbox_head.shared_fcs.#.*", "faster_rcnn.fcs.#.*"),
        ("roi_head.0.bbox_head.fc_cls.*", "faster_rcnn.class_head.*"),
        ("roi_head.0.bbox_head.fc_reg.*", "faster_rcnn.box_head.*"),
        ("bbox_head.0.cls_convs.#.conv.*", "atss.towers.class_tower.#.0.*"),
        ("bbox_head.0.cls_convs.#.gn.*", "atss.towers.class_tower.#.1.*"),
        ("bbox_head.0.reg_convs.#.conv.*", "atss.towers.box_tower.#.0.*"),
        ("bbox_head.0.reg_convs.#.gn.*", "atss.towers.box_tower.#.1.*"),
        ("bbox_head.0.atss_cls.*", "atss.towers.class_head.*"),
        ("bbox_head.0.atss_reg.*", "atss.towers.box_head.*"),
        ("bbox_head.0.atss_centerness.*", "atss.towers.centerness_head.*"),
        ("bbox_head.0.scales.#.scale", "atss.towers.scales.#"),
    )
]


def official_co_detr(names: Iterable[str]) -> Table:
    """Sense-X/Co-DETR, both its detectors; the decoder is named as detrex's"""
    names = set(names)
    heads = [
        head
        for sign, head in (("roi_head.0.", "faster_rcnn"), ("bbox_head.0.", "atss"))
        if any(name.startswith(sign) for name in names)
    ]
    number = _count("query_head.cls_branches.#.weight", names) - 1
    levels = _count("neck.convs.#.conv.weight", names)
    eva02 = any(name.startswith("neck.p2.") for name in names)
    return [
        *(CO_DETR_EVA02 if eva02 else [("backbone.*", "backbone.*")]),
        ("neck.convs.#.conv.*", "neck.projections.#.0.*"),
        ("neck.convs.#.gn.*", "neck.projections.#.1.*"),
        *(
            (f"neck.extra_convs.{i}.{theirs}.*", f"neck.projections.{levels + i}.{ours}.*")
            for i in range(_count("neck.extra_convs.#.conv.weight", names))
            for theirs, ours in (("conv", 0), ("gn", 1))
        ),
        *_mlp("query_head.transformer.decoder.ref_point_head", "decoder.placement.mlp", 2),
        *_CO_DETR_TRANSFORMER,
        ("query_head.transformer.query_embed.weight", "query_source.content"),
        ("query_head.query_embedding.weight", "query_source.content"),
        ("query_head.label_embedding.weight", "denoising.label_embed.weight"),
        (f"query_head.cls_branches.{number}.*", "query_source.class_head.*"),
        *_mlp(f"query_head.reg_branches.{number}", "query_source.box_head", 3),
        ("query_head.cls_branches.#.*", "heads.class_heads.#.*"),
        *_mlp("query_head.reg_branches.#", "heads.box_heads.#", 3),
        ("query_head.downsample.#.*", "co_heads.pyramid.coarser.0.#.*"),
        *_positive_queries(heads),
        *_CO_HEADS,
        *((f"{mask}.*", None) for mask in ("mask_head", "mask_iou_head", "roi_head.0.mask_head")),
    ]


def _positive_queries(heads: list[str]) -> Table:
    """The layers that encode each head's queries, which have its number."""
    return [
        ("query_head.transformer.head_pos_embed.weight", HEAD_EMBEDS + "+".join(heads)),
        *(
            (f"query_head.transformer.{theirs}.{i}.*", f"co_heads.queries.{head}.{ours}.*")
            for i, head in enumerate(heads)
            for theirs, ours in (
                ("aux_pos_trans", "from_box"),
                ("aux_pos_trans_norm", "from_box_norm"),
                ("pos_feats_trans", "from_feature"),
                ("pos_feats_norm", "from_feature_norm"),
            )
        ),
    ]


def _mlp(theirs: str, ours: str, num_layers: int) -> Table:
    """Linear layers in a sequence with activations between them."""
    return [(f"{theirs}.{2 * i}.*", f"{ours}.layers.{i}.*") for i in range(num_layers)]


_SIZE = "transformer.decoder.ref_anchor_head.layers.0.weight"
_SCALE = "transformer.decoder.query_scale.layers.0.weight"
_POINTS = "transformer.reference_points.weight"

# detrex's models: their tables, and names that tell each from those below it.
_DETREX = {
    "dino": (detrex_dino, ["label_enc.weight"]),
    "dn_detr": (detrex_dab, [_SIZE, "label_encoder.weight"]),
    "dab_detr": (detrex_dab, [_SIZE]),
    "dn_deformable_detr": (detrex_dab_deformable, [_SCALE, "label_encoder.weight"]),
    "dab_deformable_detr_two_stage": (
        detrex_dab_deformable,
        [_SCALE, "transformer.enc_output.weight"],
    ),
    "dab_deformable_detr": (detrex_dab_deformable, [_SCALE]),
    "deformable_detr_two_stage": (detrex_deformable, ["transformer.pos_trans.weight"]),
    "deformable_detr_refine": (
        detrex_deformable,
        [_POINTS, "transformer.decoder.bbox_embed.0.layers.0.weight"],
    ),
    "deformable_detr": (detrex_plain_deformable, [_POINTS]),
}


def detrex(names: Iterable[str]) -> Table:
    """IDEA-Research/detrex, whichever of its models it is"""
    names = set(names)
    table, _ = _DETREX[detrex_model(names)]
    return table(names)


def detrex_model(names: Iterable[str]) -> str:
    """Which of detrex's models has weights of these names.

    Raises:
        CheckpointError: none that is known here.
    """
    names = {name.removeprefix("denoising_generator.") for name in names}
    for model, (_, signs) in _DETREX.items():
        if names.issuperset(signs):
            return model
    raise CheckpointError(f"these are not detrex's weights of any of {', '.join(_DETREX)}")


def _heads(names: set[str]) -> Table:
    """One pair of heads per layer, and that of the proposals of two-stage models."""
    two_stage = "transformer.enc_output.weight" in names
    return [*(_proposal_heads(names) if two_stage else []), *_HEADS]


def _proposal_heads(names: set[str]) -> Table:
    """The proposals' heads, counted as one more layer."""
    number = _count("class_embed.#.weight", names) - 1
    return [
        (f"{prefix}{theirs}.{number}.*", f"query_source.{ours}.*")
        for prefix in ("transformer.decoder.", "")
        for theirs, ours in (("class_embed", "class_head"), ("bbox_embed", "box_head"))
    ]


def _extra_levels(names: set[str]) -> Table:
    """The neck's levels beyond those of the backbone, which detrex counts from 0."""
    levels = _count("neck.convs.#.conv.weight", names)
    return [
        (f"neck.extra_convs.{i}.{theirs}.*", f"neck.projections.{levels + i}.{ours}.*")
        for i in range(_count("neck.extra_convs.#.conv.weight", names))
        for theirs, ours in (("conv", 0), ("norm", 1))
    ]


def rename(name: str, table: Table) -> str | None:
    """The name by a table; None if the weight is to be dropped.

    Raises:
        CheckpointError: no row matches.
    """
    for theirs, ours in table:
        match = _match(theirs, name)
        if match:
            return ours and _fill(ours, match.groups())
    raise CheckpointError(f"unknown weight {name!r}")


def _fill(ours: str, found: tuple[str, ...]) -> str:
    parts = re.split(r"[#*]", ours)
    return parts[0] + "".join(value + part for value, part in zip(found, parts[1:], strict=True))


def _match(pattern: str, name: str) -> re.Match | None:
    pattern = re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
    return re.fullmatch(pattern, name)


def _count(pattern: str, names: set[str]) -> int:
    return sum(_match(pattern, name) is not None for name in names)
