"""Names of detrex's DINO, written down from its code, against `convert`."""

import pytest
import torch
from their_names import by_their_names, random_state, with_copies

from dino_d2.checkpoint import convert
from dino_d2.checkpoint.names import detrex_dino, rename
from dino_d2.models import build_dino

DETREX = [  # our beginning: detrex's
    (r"neck\.projections\.3\.0\.", "neck.extra_convs.0.conv."),
    (r"neck\.projections\.3\.1\.", "neck.extra_convs.0.norm."),
    (r"neck\.projections\.(\d)\.0\.", r"neck.convs.\1.conv."),
    (r"neck\.projections\.(\d)\.1\.", r"neck.convs.\1.norm."),
    (r"encoder\.level_embed$", "transformer.level_embeds"),
    (r"encoder\.layers\.(\d)\.attention\.", r"transformer.encoder.layers.\1.attentions.0."),
    (r"encoder\.layers\.(\d)\.attention_norm\.", r"transformer.encoder.layers.\1.norms.0."),
    (r"encoder\.layers\.(\d)\.ffn\.norm\.", r"transformer.encoder.layers.\1.norms.1."),
    (
        r"decoder\.layers\.(\d)\.self_attention\.",
        r"transformer.decoder.layers.\1.attentions.0.attn.",
    ),
    (r"decoder\.layers\.(\d)\.cross_attention\.", r"transformer.decoder.layers.\1.attentions.1."),
    (r"decoder\.layers\.(\d)\.self_attention_norm\.", r"transformer.decoder.layers.\1.norms.0."),
    (r"decoder\.layers\.(\d)\.cross_attention_norm\.", r"transformer.decoder.layers.\1.norms.1."),
    (r"decoder\.layers\.(\d)\.ffn\.norm\.", r"transformer.decoder.layers.\1.norms.2."),
    (r"(\w+)\.layers\.(\d)\.ffn\.linear1\.", r"transformer.\1.layers.\2.ffns.0.layers.0.0."),
    (r"(\w+)\.layers\.(\d)\.ffn\.linear2\.", r"transformer.\1.layers.\2.ffns.0.layers.1."),
    (r"decoder\.norm\.", "transformer.decoder.norm."),
    (r"decoder\.placement\.mlp\.", "transformer.decoder.ref_point_head."),
    (r"query_source\.project\.", "transformer.enc_output."),
    (r"query_source\.norm\.", "transformer.enc_output_norm."),
    (r"query_source\.content$", "transformer.tgt_embed.weight"),
    (r"query_source\.class_head\.", "class_embed.2."),  # after two decoder layers
    (r"query_source\.box_head\.", "bbox_embed.2."),
    (r"heads\.class_heads\.", "class_embed."),
    (r"heads\.box_heads\.", "bbox_embed."),
    (r"denoising\.label_embed\.", "label_enc."),
    (r"backbone\.", "backbone."),
]


@pytest.fixture(scope="module")
def small_detrex():
    """A model like detrex's and its weights by detrex's names."""
    state = random_state(build_dino, share_heads=False)
    weights = by_their_names(state, DETREX)
    heads = [(f"{kind}_embed.", f"transformer.decoder.{kind}_embed.") for kind in ("class", "bbox")]
    return state, with_copies(weights, *heads)


def test_detrex_weights_have_exactly_the_models_names(small_detrex):
    state, weights = small_detrex
    for converted in (convert(weights, "detrex"), convert(weights, "detrex", wanted=state)):
        torch.testing.assert_close(converted, state, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [1, 6])
def test_the_last_detrex_head_belongs_to_the_proposals(layers):
    names = [f"class_embed.{i}.weight" for i in range(layers + 1)]
    table = detrex_dino([*names, *(f"transformer.decoder.{name}" for name in names)])
    assert [rename(name, table) for name in names] == [
        *(f"heads.class_heads.{i}.weight" for i in range(layers)),
        "query_source.class_head.weight",
    ]
    box = f"transformer.decoder.bbox_embed.{layers}.layers.0.bias"
    assert rename(box, table) == "query_source.box_head.layers.0.bias"


def test_extra_detrex_levels_follow_the_backbones():
    names = [f"neck.convs.{i}.conv.weight" for i in range(3)]
    names += [f"neck.extra_convs.{i}.conv.weight" for i in range(2)]
    renamed = [rename(name, detrex_dino(names)) for name in names]
    assert renamed == [f"neck.projections.{i}.0.weight" for i in range(5)]
