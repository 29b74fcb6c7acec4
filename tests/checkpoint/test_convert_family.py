"""Official names of DN-DETR, DAB-DETR and Deformable DETR against `convert`."""

import pytest
import torch
from golden import read_json
from their_names import by_their_names, random_state, with_copies

from dino_d2.backbones import TorchvisionBackbone
from dino_d2.checkpoint import CheckpointError, convert
from dino_d2.data.coco import COCO_CATEGORY_IDS
from dino_d2.models import (
    build_dab_deformable_detr,
    build_dab_detr,
    build_deformable_detr,
    build_dn_detr,
)

# our beginning: theirs; written down from their code
ALL = [
    (r"backbone\.res2\.0\.", "backbone.0.body.layer1.0."),
    (r"encoder\.layers\.(\d)\.attention\.", r"transformer.encoder.layers.\1.self_attn."),
    (r"encoder\.layers\.(\d)\.attention_norm\.", r"transformer.encoder.layers.\1.norm1."),
    (r"encoder\.layers\.(\d)\.ffn\.norm\.", r"transformer.encoder.layers.\1.norm2."),
    (r"decoder\.layers\.(\d)\.ffn\.norm\.", r"transformer.decoder.layers.\1.norm3."),
    (r"(\w+)\.layers\.(\d)\.ffn\.", r"transformer.\1.layers.\2."),
    (r"decoder\.norm\.", "transformer.decoder.norm."),
    (r"decoder\.placement\.mlp\.", "transformer.decoder.ref_point_head."),
    (r"decoder\.placement\.scale\.", "transformer.decoder.query_scale."),
    (r"decoder\.placement\.size\.", "transformer.decoder.ref_anchor_head."),
    (r"query_source\.anchors$", "refpoint_embed.weight"),
    (r"query_source\.(?=content|positions)", "ours."),  # to be joined
    (r"denoising\.", "ours."),
]
ENCODER = [
    (r"encoder\.scale\.", "transformer.encoder.query_scale."),
    (r"neck\.projections\.0\.0\.", "input_proj."),
]
DEFORMABLE_ENCODER = [
    (r"encoder\.level_embed$", "transformer.level_embed"),
    (r"neck\.projections\.", "input_proj."),
]
PARTS = {
    "query_content": "qcontent_proj",
    "query_position": "qpos_proj",
    "query_sine": "qpos_sine_proj",
    "key_content": "kcontent_proj",
    "key_position": "kpos_proj",
    "value": "v_proj",
}
LAYER, THEIR_LAYER = r"decoder\.layers\.(\d)\.", r"transformer.decoder.layers.\1."
DECODER = [
    (rf"{LAYER}self_attention_norm\.", rf"{THEIR_LAYER}norm1."),
    (rf"{LAYER}cross_attention_norm\.", rf"{THEIR_LAYER}norm2."),
    (rf"{LAYER}self_attention\.output\.", rf"{THEIR_LAYER}self_attn.out_proj."),
    *(
        (rf"{LAYER}{attention}_attention\.{ours}\.", f"{THEIR_LAYER}{attention[0]}a_{theirs}.")
        for attention in ("self", "cross")
        for ours, theirs in PARTS.items()
    ),
    (r"query_source\.patterns$", "transformer.patterns.weight"),
    (r"heads\.class_heads\.0\.", "class_embed."),
    (r"heads\.box_heads\.0\.", "bbox_embed."),
]
ONE_LEVEL = [(rf"{LAYER}cross_attention\.output\.", rf"{THEIR_LAYER}cross_attn.out_proj.")]
LEVELS = [
    (rf"{LAYER}cross_attention\.output\.", rf"{THEIR_LAYER}ca_out_v_proj."),
    (rf"{LAYER}level\.", rf"{THEIR_LAYER}lvl_attn."),
]
DEFORMABLE_DECODER = [
    (rf"{LAYER}self_attention\.", rf"{THEIR_LAYER}self_attn."),
    (rf"{LAYER}self_attention_norm\.", rf"{THEIR_LAYER}norm2."),
    (rf"{LAYER}cross_attention\.", rf"{THEIR_LAYER}cross_attn."),
    (rf"{LAYER}cross_attention_norm\.", rf"{THEIR_LAYER}norm1."),
    (r"query_source\.patterns$", "patterns_embed.weight"),
    (r"query_source\.reference\.", "transformer.reference_points."),
    (r"query_source\.project\.", "transformer.enc_output."),
    (r"query_source\.norm\.", "transformer.enc_output_norm."),
    (r"query_source\.from_box\.", "transformer.pos_trans."),
    (r"query_source\.from_box_norm\.", "transformer.pos_trans_norm."),
    (r"query_source\.class_head\.", "class_embed.2."),  # after two decoder layers
    (r"query_source\.box_head\.", "bbox_embed.2."),
    (r"heads\.class_heads\.", "class_embed."),
    (r"heads\.box_heads\.", "bbox_embed."),
]
DENSE = [*ALL, *ENCODER, *ONE_LEVEL, *DECODER]
MIXED = [*ALL, *DEFORMABLE_ENCODER, *LEVELS, *DECODER]
DEFORMABLE = [*ALL, *DEFORMABLE_ENCODER, *DEFORMABLE_DECODER]
BOXES = ("bbox_embed.", "transformer.decoder.bbox_embed.")
CLASSES = ("class_embed.", "transformer.decoder.class_embed.")
ONE_HEAD = [(f"{kind}_embed.0.", f"{kind}_embed.1.") for kind in ("class", "bbox")]
REFINED = {"box_refinement": True}
CASES = {  # source, builder, settings, names, names of the same weights
    "DN-DAB-DETR": ("dn-detr", build_dn_detr, {}, DENSE, [BOXES]),
    "DN-DAB-DETR, patterns": ("dn-detr", build_dn_detr, {"num_patterns": 3}, DENSE, [BOXES]),
    "DN-Deformable-DETR, encoder only": (
        "dn-detr",
        build_dn_detr,
        {"num_patterns": 3, "activation": "relu"},
        MIXED,
        [BOXES],
    ),
    "DN-DAB-Deformable-DETR": (
        "dn-detr",
        build_dn_detr,
        {"deformable": True},
        DEFORMABLE,
        [BOXES],
    ),
    "DAB-DETR": ("dab-detr", build_dab_detr, {}, DENSE, [BOXES]),
    "DAB-DETR, patterns": ("dab-detr", build_dab_detr, {"num_patterns": 3}, DENSE, [BOXES]),
    "DAB-Deformable-DETR": ("dab-detr", build_dab_deformable_detr, {}, DEFORMABLE, [BOXES]),
    "DAB-Deformable-DETR, patterns": (
        "dab-detr",
        build_dab_deformable_detr,
        {"num_patterns": 3},
        DEFORMABLE,
        [BOXES],
    ),
    "Deformable DETR": ("deformable-detr", build_deformable_detr, {}, DEFORMABLE, ONE_HEAD),
    "Deformable DETR, refined": (
        "deformable-detr",
        build_deformable_detr,
        REFINED,
        DEFORMABLE,
        [BOXES],
    ),
    "Deformable DETR, two-stage": (
        "deformable-detr",
        build_deformable_detr,
        {**REFINED, "two_stage": True},
        DEFORMABLE,
        [BOXES, CLASSES],
    ),
}


def join(weights):
    """The official weights that hold two of ours, and their unused row of labels."""
    weights = dict(weights)
    parts = ("label_embed.weight", "content", "positions")
    labels, content, positions = (weights.pop(f"ours.{part}", None) for part in parts)
    if positions is not None:
        return {**weights, "query_embed.weight": torch.cat([positions, content], 1)}
    if labels is not None and len(content) == 1:
        return {**weights, "label_enc.weight": torch.cat([labels, content])}
    if labels is not None:
        weights["label_enc.weight"] = torch.cat([labels, torch.rand_like(labels[:1])])
    return weights if content is None else {**weights, "tgt_embed.weight": content}


@pytest.fixture(params=CASES)
def given(request):
    """Where weights come from, a state dict, and the same by official names."""
    source, build, settings, table, copies = CASES[request.param]
    if table is DENSE:
        features, levels = ["res5"], {}
    else:
        features, levels = ["res3", "res4", "res5"], {"num_levels": 4}
    state = random_state(build, features, num_classes=7, **levels, **settings)
    return source, state, with_copies(join(by_their_names(state, table)), *copies)


def test_official_weights_have_exactly_the_models_names(given):
    source, state, weights = given
    for converted in (convert(weights, source), convert(weights, source, wanted=state)):
        torch.testing.assert_close(converted, state, rtol=0, atol=0)


def test_an_unknown_name_is_an_error(given):
    source, _, weights = given
    name = "transformer.decoder.layers.0.surprise.weight"
    with pytest.raises(CheckpointError, match=f"unknown weight '{name}'"):
        convert({**weights, name: torch.ones(1)}, source)


def test_weights_of_another_source_are_an_error(given):
    source, _, weights = given
    for other in {"dino", "deformable-detr"} - {source}:
        with pytest.raises(CheckpointError, match="unknown weight"):
            convert(weights, other)


@pytest.mark.parametrize(
    ("case", "strides", "settings"),
    [
        ("dn_dab_detr_r50_eval", (32,), {}),
        ("dn_dab_deformable_detr_r50_eval", (8, 16, 32), {"deformable": True, "num_levels": 4}),
    ],
)
def test_published_names_and_shapes_fit_the_model(case, strides, settings):
    spec = read_json(f"dn_detr/{case}", "spec")
    weights = {name: torch.zeros(how["shape"]) for name, how in spec["parameters"].items()}
    heads = [name for name in weights if name.startswith(("class_embed", "bbox_embed"))]
    weights.update({name: torch.rand(weights[name].shape) for name in heads})  # not all the same
    weights.update({alias: weights[name] for alias, name in spec["aliases"].items()})
    with torch.device("meta"):
        backbone = TorchvisionBackbone("resnet50", strides, norm="FrozenBN")
        features = [f"stride{stride}" for stride in strides]
        model = build_dn_detr(backbone, features, num_classes=91, **settings)
    assert set(convert(weights, "dn-detr", wanted=model.state_dict())) == set(model.state_dict())


def test_the_last_label_is_the_content_of_ordinary_queries():
    state = random_state(build_dn_detr, ["res5"], num_classes=91)
    weights = join(by_their_names(state, DENSE))
    assert weights["label_enc.weight"].shape == (92, 31)
    converted = convert(weights, "dn-detr", num_classes=80)
    rows = weights["label_enc.weight"]
    assert torch.equal(converted["denoising.label_embed.weight"], rows[COCO_CATEGORY_IDS])
    assert torch.equal(converted["query_source.content"], rows[91:])


def test_query_embeddings_are_positions_then_content():
    weights = {"class_embed.0.weight": torch.rand(7, 4), "query_embed.weight": torch.rand(5, 8)}
    converted = convert(weights, "deformable-detr")
    assert torch.equal(converted["query_source.positions"], weights["query_embed.weight"][:, :4])
    assert torch.equal(converted["query_source.content"], weights["query_embed.weight"][:, 4:])


def test_the_first_class_of_two_stage_proposals_stays():
    """It means any object; the others are never used."""
    settings = {**REFINED, "two_stage": True, "num_levels": 4}
    features = ["res3", "res4", "res5"]
    state = random_state(build_deformable_detr, features, num_classes=91, **settings)
    converted = convert(by_their_names(state, DEFORMABLE), "deformable-detr", num_classes=80)
    for kind in ("weight", "bias"):
        name = f"query_source.class_head.{kind}"
        assert converted[name].shape[0] == 80
        assert torch.equal(converted[name][0], state[name][0])
        name = f"heads.class_heads.1.{kind}"
        assert torch.equal(converted[name], state[name][COCO_CATEGORY_IDS])
