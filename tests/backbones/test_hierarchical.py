import pytest
import torch
import torchvision
from timm.layers import DropPath
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dino_d2.backbones import FeatureShape, TimmBackbone, TorchvisionBackbone

STRIDES = (4, 8, 16, 32)
SWIN = {
    "embed_dim": 8,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 1, 2, 2),
    "strict_img_size": False,
    "always_partition": True,
}
CHANNELS = {
    ("timm", "resnet10t"): (64, 128, 256, 512),
    ("timm", "test_convnext"): (24, 32, 48, 64),
    ("timm", "regnetx_002"): (24, 56, 152, 368),
    ("timm", "swin_tiny_patch4_window7_224"): (8, 16, 32, 64),
    ("torchvision", "resnet18"): (64, 128, 256, 512),
    ("torchvision", "convnext_tiny"): (96, 192, 384, 768),
    ("torchvision", "regnet_x_400mf"): (32, 64, 160, 400),
    ("torchvision", "swin_t"): (96, 192, 384, 768),
}
# The first weight of every stage, after one of the stem
WEIGHTS = {
    ("timm", "resnet10t"): ["conv1.0", *(f"layer{i}.0.conv1" for i in (1, 2, 3, 4))],
    ("timm", "test_convnext"): ["stem_0", *(f"stages_{i}.blocks.0.conv_dw" for i in range(4))],
    ("timm", "regnetx_002"): ["stem.conv", *(f"s{i}.b1.conv1.conv" for i in (1, 2, 3, 4))],
    ("timm", "swin_tiny_patch4_window7_224"): [
        "patch_embed.proj",
        *(f"layers_{i}.blocks.0.attn.qkv" for i in range(4)),
    ],
    ("torchvision", "resnet18"): ["conv1", *(f"layer{i}.0.conv1" for i in (1, 2, 3, 4))],
    ("torchvision", "convnext_tiny"): [
        "features.0.0",
        *(f"features.{i}.0.block.0" for i in (1, 3, 5, 7)),
    ],
    ("torchvision", "swin_t"): [
        "features.0.0",
        *(f"features.{i}.0.attn.qkv" for i in (1, 3, 5, 7)),
    ],
}


def make_backbone(library, name, strides=STRIDES, **settings):
    if library == "torchvision":
        return TorchvisionBackbone(name, strides, **settings)
    options = SWIN if name.startswith("swin") else {}
    return TimmBackbone(name, strides, options=options, **settings)


def trainable(backbone):
    return {name for name, p in backbone.body.named_parameters() if p.requires_grad}


def statistics(backbone):
    return {n: b.clone() for n, b in backbone.named_buffers() if "running" in n}


def unmoved_by_training(backbone):
    """Names of the statistics that a training step leaves as they are."""
    before = statistics(backbone.train())
    backbone(torch.randn(2, 3, 64, 64))
    return {n for n, b in statistics(backbone).items() if torch.equal(b, before[n])}


@pytest.mark.parametrize(("library", "name"), CHANNELS)
@pytest.mark.parametrize("size", [(64, 96), (70, 101)], ids=["even", "odd"])
def test_maps_have_the_names_channels_and_sizes_that_are_said(library, name, size):
    # torchvision's RegNet computes its widths with tensors
    with torch.device("cpu" if name.startswith("regnet_") else "meta"):
        backbone = make_backbone(library, name)
        maps = backbone(torch.zeros(2, 3, *size))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == ["stride4", "stride8", "stride16", "stride32"]
    assert tuple(s.channels for s in shapes.values()) == CHANNELS[library, name]
    for feature, (channels, stride) in zip(maps.values(), shapes.values(), strict=True):
        assert feature.shape[:2] == (2, channels)
        for side, whole in zip(feature.shape[2:], size, strict=True):
            assert abs(side * stride - whole) < stride  # rounded down or up


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_some_of_the_maps(library):
    with torch.device("meta"):
        backbone = make_backbone(library, "resnet18", strides=(8, 32))
        maps = backbone(torch.empty(1, 3, 64, 64))
    assert backbone.output_shape() == {
        "stride8": FeatureShape(128, 8),
        "stride32": FeatureShape(512, 32),
    }
    assert [tuple(m.shape) for m in maps.values()] == [(1, 128, 8, 8), (1, 512, 2, 2)]


def test_maps_equal_torchvisions_own_layers():
    model = torchvision.models.resnet18()
    backbone = TorchvisionBackbone("resnet18", STRIDES)
    backbone.body.load_state_dict(model.state_dict(), strict=False)
    x = images = torch.randn(2, 3, 70, 90)
    backbone.eval(), model.eval()
    with torch.no_grad():
        for layer in (model.conv1, model.bn1, model.relu, model.maxpool):
            x = layer(x)
        for stage, feature in enumerate(backbone(images).values(), 1):
            x = model.get_submodule(f"layer{stage}")(x)
            torch.testing.assert_close(feature, x)


@torch.no_grad()
def test_a_dilated_last_stage_is_the_map_of_stride_16(one_thread):
    options = {"replace_stride_with_dilation": [False, False, True]}
    model = torchvision.models.resnet50(**options).eval()
    backbone = TorchvisionBackbone("resnet50", (8, 16), dilated=True).eval()
    backbone.body.load_state_dict(model.state_dict(), strict=False)
    assert backbone.output_shape() == {
        "stride8": FeatureShape(512, 8),
        "stride16": FeatureShape(2048, 16),
    }
    x = images = torch.randn(1, 3, 40, 52)
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = model.get_submodule(name)(x)
    feature = backbone(images)["stride16"]
    assert feature.shape == (1, 2048, 3, 4)
    torch.testing.assert_close(feature, x)
    with pytest.raises(ValueError, match=r"strides \[4, 8, 16\]; asked for, .* \[32\]"):
        TorchvisionBackbone("resnet50", (32,), dilated=True)


@pytest.mark.parametrize(("library", "name"), WEIGHTS)
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4, 9])
def test_freeze_at_freezes_the_stem_and_the_first_stages(library, name, freeze_at):
    with torch.device("meta"):
        backbone = make_backbone(library, name, freeze_at=freeze_at)
    learned = trainable(backbone)
    frozen = [f"{weight}.weight" not in learned for weight in WEIGHTS[library, name]]
    assert frozen == [i < freeze_at for i in range(5)]
    assert bool(learned) == (freeze_at < 5)


def test_freeze_at_where_stages_lie_one_level_down():
    learned = trainable(TorchvisionBackbone("regnet_x_400mf", freeze_at=2))
    assert {name.split(".")[1] for name in learned} == {"block2", "block3", "block4"}


def test_freeze_at_beyond_the_last_stage_that_is_used():
    with torch.device("meta"):
        backbone = TimmBackbone("resnet10t", (4, 8), freeze_at=4)
    assert not trainable(backbone)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_statistics_of_frozen_stages_do_not_move(library):
    backbone = make_backbone(library, "resnet18", strides=(4, 8), freeze_at=2)
    frozen = ("body.bn1.", "body.layer1.")
    expected = {name for name in statistics(backbone) if name.startswith(frozen)}
    assert len(expected) == 2 * (1 + 4)
    assert unmoved_by_training(backbone) == expected


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet10t"), ("torchvision", "resnet18")])
def test_frozen_batch_norm_learns_nothing_and_does_not_move(library, name):
    backbone = make_backbone(library, name, strides=(8,), norm="FrozenBN")
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert not [p for norm in norms for p in norm.parameters()]
    assert unmoved_by_training(backbone) == set(statistics(backbone))
    assert trainable(backbone)


def test_batch_norm_moves_by_default():
    assert not unmoved_by_training(TimmBackbone("resnet10t", (4,)))


def test_drop_path_reaches_the_model():
    def rates(drop_path):
        body = TimmBackbone("test_convnext", drop_path=drop_path).body
        return [m.drop_prob for m in body.modules() if isinstance(m, DropPath)]

    assert max(rates(0.3)) == pytest.approx(0.3)
    assert not rates(0.0)


def test_output_norm_normalises_the_channels_of_every_map():
    backbone = TimmBackbone("test_convnext", output_norm=1e-6)
    assert [norm.eps for norm in backbone.norms.values()] == [1e-6] * 3
    for feature in backbone(torch.randn(1, 3, 64, 64)).values():
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]))
        variance = feature.var(1, correction=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-2)


def test_every_map_has_a_norm_of_its_own():
    backbone = TimmBackbone("test_convnext", (8, 32), output_norm=1e-5)
    assert list(backbone.norms) == ["stride8", "stride32"]
    with torch.no_grad():
        backbone.norms["stride32"].bias.fill_(5)
    fine, coarse = backbone(torch.randn(1, 3, 64, 64)).values()
    assert fine.mean().item() == pytest.approx(0, abs=1e-5)
    assert coarse.mean().item() == pytest.approx(5, abs=1e-5)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_strides_that_the_model_has_not(library):
    with pytest.raises(ValueError, match=r"resnet18 has .*4, 8, 16, 32\].* \[8, 64\]"):
        make_backbone(library, "resnet18", strides=(8, 64))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_strides_in_the_wrong_order(library):
    with pytest.raises(ValueError, match=r"finest first, were \[16, 8\]"):
        make_backbone(library, "resnet18", strides=(16, 8))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_unknown_norm(library):
    with torch.device("meta"), pytest.raises(ValueError, match="'FrozenBN', but is 'GN'"):
        make_backbone(library, "resnet18", norm="GN")


def test_unknown_kind_of_torchvision_model():
    with pytest.raises(ValueError, match="torchvision's vgg11; use TimmBackbone"):
        TorchvisionBackbone("vgg11")


def test_stages_that_cannot_be_told_apart_cannot_be_frozen():
    TimmBackbone("test_efficientnet")
    with pytest.raises(ValueError, match="freeze_at must be 0"):
        TimmBackbone("test_efficientnet", freeze_at=2)
