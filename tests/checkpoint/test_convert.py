import re
from itertools import chain

import pytest
import torch
from golden import official_state, read_json

from dino_d2.backbones import TimmBackbone
from dino_d2.checkpoint import CheckpointError, convert, load_weights
from dino_d2.checkpoint import backbones as backbone_tables
from dino_d2.checkpoint import names as tables

EVAL = "dino/dino_4scale_r50_eval"
UNUSED_COCO_IDS = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CLASSES = {  # ours: official
    "heads.class_heads.0.weight": "class_embed.0.weight",
    "heads.class_heads.0.bias": "class_embed.0.bias",
    "query_source.class_head.weight": "transformer.enc_out_class_embed.weight",
    "query_source.class_head.bias": "transformer.enc_out_class_embed.bias",
    "denoising.label_embed.weight": "label_enc.weight",
}
OURS = {  # official name: ours, one of every kind
    "backbone.0.body.layer2.0.bn1.weight": "backbone.res3.0.conv1.norm.weight",
    "input_proj.3.1.bias": "neck.projections.3.1.bias",
    "transformer.level_embed": "encoder.level_embed",
    "transformer.encoder.layers.4.self_attn.value_proj.bias": (
        "encoder.layers.4.attention.value_proj.bias"
    ),
    "transformer.encoder.layers.4.norm1.bias": "encoder.layers.4.attention_norm.bias",
    "transformer.encoder.layers.4.linear2.weight": "encoder.layers.4.ffn.linear2.weight",
    "transformer.encoder.layers.4.norm2.bias": "encoder.layers.4.ffn.norm.bias",
    "transformer.enc_output_norm.weight": "query_source.norm.weight",
    "transformer.enc_out_bbox_embed.layers.1.weight": "query_source.box_head.layers.1.weight",
    "transformer.tgt_embed.weight": "query_source.content",
    "transformer.decoder.layers.2.norm1.weight": "decoder.layers.2.cross_attention_norm.weight",
    "transformer.decoder.layers.2.norm2.weight": "decoder.layers.2.self_attention_norm.weight",
    "transformer.decoder.layers.2.norm3.weight": "decoder.layers.2.ffn.norm.weight",
    "transformer.decoder.ref_point_head.layers.0.bias": "decoder.placement.mlp.layers.0.bias",
    "transformer.decoder.bbox_embed.0.layers.2.bias": "heads.box_heads.0.layers.2.bias",
}


@pytest.fixture(scope="module")
def official():
    return official_state(EVAL)


@pytest.fixture(scope="module")
def converted(official):
    return convert(official, "dino")


def small_official(extra, scales=4):
    """A few weights around those of a backbone."""
    kernels = [1] * (scales - 1) + [3]
    neck = {f"input_proj.{i}.0.weight": torch.rand(8, 8, k, k) for i, k in enumerate(kernels)}
    heads = {"class_embed.0.weight": torch.rand(91, 8), "label_enc.weight": torch.rand(92, 8)}
    return {**neck, **heads, **extra}


def test_no_official_weight_is_lost(official, converted):
    distinct = read_json(EVAL, "spec")["parameters"]
    assert len(converted) == len(distinct)
    unused_label = 256
    given = sum(official[name].numel() for name in distinct)
    assert sum(tensor.numel() for tensor in converted.values()) == given - unused_label


@pytest.mark.parametrize("name", OURS)
def test_official_name(official, converted, name):
    torch.testing.assert_close(converted[OURS[name]], official[name])


def test_unknown_official_name_is_an_error(official):
    with pytest.raises(CheckpointError, match=r"'transformer\.decoder\.surprise'"):
        convert({**official, "transformer.decoder.surprise": torch.ones(1)}, "dino")


def test_unknown_source_is_an_error(official):
    with pytest.raises(CheckpointError, match=r"'mmdetection'; known are co-detr, dino, dn-detr, "):
        convert(official, "mmdetection")


def test_unequal_copies_are_an_error(official):
    changed = {**official, "bbox_embed.3.layers.0.bias": torch.ones(256)}
    with pytest.raises(CheckpointError, match=r"heads\.box_heads\.3\.layers\.0\.bias"):
        convert(changed, "dino")


def test_heads_that_differ_by_layer_stay(official):
    names = ("class_embed.3.bias", "transformer.decoder.class_embed.3.bias")
    converted = convert({**official, **dict.fromkeys(names, torch.ones(91))}, "dino")
    assert converted["heads.class_heads.3.bias"].tolist() == [1] * 91
    assert "heads.box_heads.5.layers.0.bias" in converted


@pytest.mark.parametrize("name", CLASSES)
def test_80_classes_are_the_used_coco_ids(official, name):
    used = [i for i in range(91) if i not in UNUSED_COCO_IDS]
    assert len(used) == 80
    converted = convert(official, "dino", num_classes=80)
    torch.testing.assert_close(converted[name], official[CLASSES[name]][used])


@pytest.mark.parametrize("num_classes", [None, 91])
def test_91_classes_stay(official, num_classes):
    converted = convert(official, "dino", num_classes)
    for name, theirs in CLASSES.items():
        torch.testing.assert_close(converted[name], official[theirs][:91])


@pytest.mark.parametrize("num_classes", [1, 90, 92])
def test_other_numbers_of_classes_are_an_error(official, num_classes):
    with pytest.raises(CheckpointError, match=f"cannot turn 91 classes into {num_classes}"):
        convert(official, "dino", num_classes)


def test_weights_without_a_class_head_are_an_error():
    with pytest.raises(CheckpointError, match="no class head"):
        convert({"transformer.level_embed": torch.ones(4, 8)}, "dino")


@pytest.mark.detectron2
@pytest.mark.parametrize("num_classes", [80, 91])
def test_result_loads_into_the_shipped_model(official, num_classes):
    from detectron2.config import instantiate

    from dino_d2 import model_zoo

    cfg = model_zoo.get_config("dino/dino_r50_4scale_12ep")
    cfg.model.detector.num_classes = num_classes
    model = instantiate(cfg.model)
    load_weights(model, convert(official, "dino", num_classes))
    loaded = model.detector.backbone.res3[0].shortcut.weight
    expected = official["backbone.0.body.layer2.0.downsample.0.weight"]
    torch.testing.assert_close(loaded.detach(), expected.float())
    assert len(model.detector.heads.class_heads[0].bias) == num_classes


def test_misfitting_model_is_an_error(official, converted):
    wanted = {**converted, "query_source.content": torch.empty(300, 256)}
    with pytest.raises(CheckpointError, match=r"content: \(900, 256\) given, \(300, 256\) wanted"):
        convert(official, "dino", wanted=wanted)


def swin_names(depths, norms):
    """As the official Swin has them."""
    names = [f"patch_embed.{n}.{kind}" for n in ("proj", "norm") for kind in ("weight", "bias")]
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                names += [f"{block}.{part}.weight", f"{block}.{part}.bias"]
            names.append(f"{block}.attn.relative_position_bias_table")
            names.append(f"{block}.attn.relative_position_index")
        if i < 3:
            downsample = f"layers.{i}.downsample"
            names += [f"{downsample}.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")]
    return names + [f"norm{i}.{kind}" for i in norms for kind in ("weight", "bias")]


def convnext_names(depths):
    """As the official ConvNeXt has them, with a norm for each of four maps."""
    parts = [f"downsample_layers.{i}.{j}" for i in range(4) for j in range(2)]
    parts += [f"norm{i}" for i in range(4)]
    blocks = [f"stages.{i}.{j}" for i, depth in enumerate(depths) for j in range(depth)]
    parts += [f"{b}.{p}" for b in blocks for p in ("dwconv", "norm", "pwconv1", "pwconv2")]
    return [f"{b}.gamma" for b in blocks] + [f"{p}.{k}" for p in parts for k in ("weight", "bias")]


def converted_backbone(names, scales):
    weights = {f"backbone.0.{name}": torch.rand(1) for name in names}
    converted = convert(small_official(weights, scales), "dino")
    return {n.removeprefix("backbone.") for n in converted if n.startswith("backbone.")}


@pytest.mark.detectron2
@pytest.mark.parametrize(("scales", "outputs"), [(4, (1, 2, 3)), (5, (0, 1, 2, 3))])
def test_official_swin_becomes_detectron2s(scales, outputs):
    from detectron2.modeling import SwinTransformer

    sizes = {"embed_dim": 4, "depths": (2, 2, 3, 2), "num_heads": (1, 1, 1, 1)}
    wanted = SwinTransformer(**sizes, out_indices=outputs).state_dict()
    names = converted_backbone(swin_names(sizes["depths"], outputs), scales)
    assert names == {name for name in wanted if not backbone_tables.is_derived(name)}


@pytest.mark.parametrize(("scales", "strides"), [(4, (8, 16, 32)), (5, (4, 8, 16, 32))])
def test_official_convnext_becomes_timms(scales, strides):
    with torch.device("meta"):
        wanted = TimmBackbone("convnext_tiny", strides, output_norm=1e-6).state_dict()
    assert converted_backbone(convnext_names((3, 3, 9, 3)), scales) == set(wanted)


def test_tables_carry_every_placeholder_over():
    parts = [part for part in vars(tables).values() if isinstance(part, list)]
    whole = [
        tables.official_dino([]),
        tables.official_dab([]),
        tables.official_dab(["sa_qcontent"]),
    ]
    whole += [tables.official_deformable_detr(["transformer.enc_output.weight"])]
    for theirs, ours in chain(*parts, *whole, *backbone_tables._TABLES):
        assert ours is None or len(re.findall(r"[#*]", theirs)) == len(re.findall(r"[#*]", ours))
