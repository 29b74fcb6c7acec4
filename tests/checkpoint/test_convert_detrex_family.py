"""Names of detrex's detectors besides DINO, written down from its code, against `convert`."""

import pytest
import torch
from their_names import SIZES, NamedBackbone, by_their_names, with_copies

from dino_d2.checkpoint import CheckpointError, convert, write_weights
from dino_d2.checkpoint.convert import DETREX_SETTINGS
from dino_d2.checkpoint.names import detrex_model
from dino_d2.models import (
    build_dab_deformable_detr,
    build_dab_detr,
    build_deformable_detr,
    build_dn_detr,
)
from dino_d2.tools import convert_checkpoint
from dino_d2.transformer import QuerySelection

ALL = ["res3", "res4", "res5"]
BUILDERS = {  # by detrex's model: the builder, its features, and arguments that are no setting
    "dab_detr": (build_dab_detr, ["res5"], {"num_patterns": 2}),
    "dn_detr": (build_dn_detr, ["res5"], {}),
    "dab_deformable_detr": (build_dab_deformable_detr, ALL, {}),
    "dab_deformable_detr_two_stage": (build_dab_deformable_detr, ALL, {}),
    "dn_deformable_detr": (build_dn_detr, ALL, {"deformable": True, "num_levels": 4}),
    "deformable_detr": (build_deformable_detr, ALL, {}),
    "deformable_detr_refine": (build_deformable_detr, ALL, {}),
    "deformable_detr_two_stage": (build_deformable_detr, ALL, {}),
}

LAYERS = r"(encoder|decoder)\.layers\.(\d)\."
LAYER = r"transformer.\1.layers.\2."
FFN = LAYER + "ffns.0.layers."
DETREX = [  # our beginning: detrex's
    (r"neck\.projections\.3\.0\.", "neck.extra_convs.0.conv."),
    (r"neck\.projections\.3\.1\.", "neck.extra_convs.0.norm."),
    (r"neck\.projections\.(\d)\.0\.", r"neck.convs.\1.conv."),
    (r"neck\.projections\.(\d)\.1\.", r"neck.convs.\1.norm."),
    (r"encoder\.level_embed$", "transformer.level_embeds"),
    (r"encoder\.scale\.", "transformer.encoder.query_scale."),
    (LAYERS + r"attention\.", LAYER + "attentions.0."),
    (LAYERS + r"attention_norm\.", LAYER + "norms.0."),
    (LAYERS + r"self_attention\.", LAYER + "attentions.0.attn."),
    (LAYERS + r"cross_attention\.", LAYER + "attentions.1."),
    (LAYERS + r"self_attention_norm\.", LAYER + "norms.0."),
    (LAYERS + r"cross_attention_norm\.", LAYER + "norms.1."),
    (LAYERS + r"ffn\.linear1\.", FFN + "0.0."),
    (LAYERS + r"ffn\.activation\.", FFN + "0.1."),
    (LAYERS + r"ffn\.linear2\.", FFN + "1."),
    (r"encoder\.layers\.(\d)\.ffn\.norm\.", r"transformer.encoder.layers.\1.norms.1."),
    (r"decoder\.layers\.(\d)\.ffn\.norm\.", r"transformer.decoder.layers.\1.norms.2."),
    (r"decoder\.norm\.", "transformer.decoder.post_norm_layer."),
    (r"decoder\.placement\.mlp\.", "transformer.decoder.ref_point_head."),
    (r"decoder\.placement\.scale\.", "transformer.decoder.query_scale."),
    (r"decoder\.placement\.size\.", "transformer.decoder.ref_anchor_head."),
    (r"query_source\.project\.", "transformer.enc_output."),
    (r"query_source\.norm\.", "transformer.enc_output_norm."),
    (r"query_source\.class_head\.", "class_embed.2."),  # after two decoder layers
    (r"query_source\.box_head\.", "bbox_embed.2."),
    (r"query_source\.from_box\.", "transformer.pos_trans."),
    (r"query_source\.from_box_norm\.", "transformer.pos_trans_norm."),
    (r"query_source\.reference\.", "transformer.reference_points."),
    (r"query_source\.content$", "tgt_embed.weight"),
    (r"query_source\.anchors$", "refpoint_embed.weight"),
    (r"query_source\.patterns$", "transformer.patterns.weight"),
    (r"heads\.class_heads\.", "class_embed."),
    (r"heads\.box_heads\.", "bbox_embed."),
    (r"backbone\.", "backbone."),
]
DENSE = [
    (r"neck\.projections\.0\.0\.", "input_proj."),
    (r"query_source\.anchors$", "anchor_box_embed.weight"),
    (r"encoder\.layers\.(\d)\.attention\.", r"transformer.encoder.layers.\1.attentions.0.attn."),
    (r"heads\.class_heads\.0\.", "class_embed."),
    (r"heads\.box_heads\.0\.", "bbox_embed."),
    *(
        (
            rf"decoder\.layers\.(\d)\.{attention}\.{ours}\.",
            rf"transformer.decoder.layers.\1.attentions.{number}.{theirs}_proj.",
        )
        for number, attention in enumerate(["self_attention", "cross_attention"])
        for ours, theirs in {
            "query_content": "query_content",
            "query_position": "query_pos",
            "query_sine": "query_pos_sine",
            "key_content": "key_content",
            "key_position": "key_pos",
            "value": "value",
            "output": "out",
        }.items()
    ),
    *DETREX,
]


def build(model):
    """Ours with the settings for detrex's model."""
    builder, features, arguments = BUILDERS[model]
    settings = {
        name.removeprefix("detector."): value
        for name, value in DETREX_SETTINGS[model].items()
        if name.startswith("detector.")
    }
    return builder(NamedBackbone(), features, **SIZES, **arguments, **settings)


def detrex_weights(model, state):
    """Our weights by detrex's names, with all the copies that detrex has of some."""
    state = dict(state)
    labels = state.pop("denoising.label_embed.weight", None)
    weights = {}
    if model == "dn_detr":  # ordinary queries have the embedding behind those of the classes
        rows = torch.cat([labels, state.pop("query_source.content")])
        weights["denoising_generator.label_encoder.weight"] = rows
    elif labels is not None:  # and elsewhere it is unused
        weights["denoising_generator.label_encoder.weight"] = torch.cat([labels, labels[:1] + 1])
    if "query_source.positions" in state:
        halves = [state.pop(f"query_source.{part}") for part in ("positions", "content")]
        weights["query_embedding.weight"] = torch.cat(halves, 1)
    weights.update(by_their_names(state, DENSE if model in ("dab_detr", "dn_detr") else DETREX))
    copies = [("bbox_embed.", "transformer.decoder.bbox_embed.")]
    if model.endswith("two_stage"):
        copies.append(("class_embed.", "transformer.decoder.class_embed."))
    if model == "deformable_detr":
        copies = [(f"{kind}_embed.0.", f"{kind}_embed.1.") for kind in ("class", "bbox")]
    for ffn in {name.split("layers.0.1.")[0] for name in weights if ".ffns.0.layers.0.1." in name}:
        copies.append((f"{ffn}layers.0.1.", f"{ffn}activation."))
    return with_copies(weights, *copies)


@pytest.fixture(scope="module", params=BUILDERS)
def detrex(request):
    """A model of detrex: its name, a state of ours, and the same weights by detrex's names."""
    state = {name: torch.rand_like(t) for name, t in build(request.param).state_dict().items()}
    return request.param, state, detrex_weights(request.param, state)


def test_detrex_weights_have_exactly_the_models_names(detrex):
    model, state, weights = detrex
    assert detrex_model(weights) == model
    for converted in (convert(weights, "detrex"), convert(weights, "detrex", wanted=state)):
        torch.testing.assert_close(converted, state, rtol=0, atol=0)


def test_the_tool_prints_what_to_change(detrex, tmp_path, capsys):
    model, _, weights = detrex
    write_weights({name: t.clone() for name, t in weights.items()}, tmp_path / "detrex.pth")
    paths = [str(tmp_path / name) for name in ("detrex.pth", "ours.pth")]
    convert_checkpoint.main(["--from", "detrex", *paths])
    printed = capsys.readouterr().out
    assert f"detrex's {model}:" in printed
    for name, value in DETREX_SETTINGS[model].items():
        assert f"model.{name}={value}" in printed


def test_settings_reach_the_model():
    assert isinstance(build("dab_deformable_detr_two_stage").query_source, QuerySelection)
    for model in BUILDERS:
        assert build(model).heads.eps == 1e-3  # in all that detrex has


def test_labels_in_files_that_detrex_converted():
    state = build("dn_deformable_detr").state_dict()
    weights = detrex_weights("dn_deformable_detr", state)
    named = {name.removeprefix("denoising_generator."): t for name, t in weights.items()}
    torch.testing.assert_close(convert(named, "detrex", wanted=state), dict(state))


def test_without_refinement_heads_must_be_equal():
    weights = detrex_weights("deformable_detr", build("deformable_detr").state_dict())
    weights["class_embed.1.bias"] = torch.ones(80)
    with pytest.raises(CheckpointError, match=r"'class_embed\.1\.bias' should equal another copy"):
        convert(weights, "detrex")


def test_another_model_of_detrex_is_an_error():
    with pytest.raises(CheckpointError, match=r"not detrex's weights of any of dino, dn_detr"):
        convert({"query_embed.weight": torch.ones(1)}, "detrex")
