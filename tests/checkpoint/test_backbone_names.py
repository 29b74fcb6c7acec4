import functools
import re

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional

from dino_d2.backbones import TimmBackbone, TorchvisionBackbone
from dino_d2.checkpoint import CheckpointError, load_backbone, load_weights
from dino_d2.checkpoint.backbones import from_mmdetection

STRIDES = (4, 8, 16, 32)
SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
LIBRARIES = ["torchvision", "timm", pytest.param("detectron2", marks=pytest.mark.detectron2)]
# What timm calls a ConvNeXt's weights, what its authors do
CONVNEXT_NAMES = [
    (r"body\.stem_(\d)\.", r"downsample_layers.0.\1."),
    (r"body\.stages_(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"body\.stages_(\d)\.blocks\.(\d)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"body\.stages_(\d)\.blocks\.(\d)\.mlp\.fc", r"stages.\1.\2.pwconv"),
    (r"body\.stages_(\d)\.blocks\.(\d)\.", r"stages.\1.\2."),
    (r"norms\.stride8\.", "norm1."),
    (r"norms\.stride16\.", "norm2."),
    (r"norms\.stride32\.", "norm3."),
]


def make_resnet(library):
    if library == "torchvision":
        return TorchvisionBackbone("resnet18", STRIDES)
    if library == "timm":
        return TimmBackbone("resnet18", STRIDES)
    from detectron2.modeling.backbone import BasicStem, ResNet

    stages = ResNet.make_default_stages(18, norm="BN")
    return ResNet(BasicStem(norm="BN"), stages, out_features=["res2", "res3", "res4", "res5"])


@functools.cache  # they take seconds
def get_resnet(library, role):
    return shuffle(make_resnet(library)) if role == "source" else make_resnet(library)


def make_swin(library):
    if library == "timm":
        options = {**SWIN, "strict_img_size": False, "always_partition": True}
        name = "swin_tiny_patch4_window7_224"
        return TimmBackbone(name, STRIDES, output_norm=1e-5, options=options)
    from detectron2.modeling import SwinTransformer

    return SwinTransformer(**SWIN, out_indices=(0, 1, 2, 3))


def shuffle(model):
    """Give every weight a value of its own."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand_like(tensor)).add_(0.02 * torch.rand_like(tensor))
    return model


def assert_same_features(first, second, size=(70, 101)):
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = [list(model.eval()(images).values()) for model in (first, second)]
    assert len(maps[0]) == len(maps[1]) == 4
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-4)


def assert_state(model, expected):
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("target", LIBRARIES)
@pytest.mark.parametrize("source", LIBRARIES)
def test_resnet_between_libraries(source, target):
    source, target = get_resnet(source, "source"), get_resnet(target, "target")
    load_backbone(target, source.state_dict())
    assert_same_features(source, target)


@pytest.mark.detectron2
@pytest.mark.parametrize(("source", "target"), [("timm", "detectron2"), ("detectron2", "timm")])
def test_swin_between_libraries(source, target):
    source, target = shuffle(make_swin(source)), make_swin(target)
    load_backbone(target, source.state_dict())
    assert_same_features(source, target, (224, 224))  # timm pads windows in another way


def test_backbone_inside_a_detector_is_translated():
    backbones = get_resnet("torchvision", "source"), get_resnet("timm", "target")
    source, target = (nn.ModuleDict({"backbone": b, "neck": nn.Linear(2, 3)}) for b in backbones)
    load_weights(nn.ModuleDict({"detector": target}), source.state_dict())
    assert_same_features(*backbones)
    assert_state(target["neck"], source["neck"].state_dict())


@pytest.mark.parametrize("library", LIBRARIES)
def test_classifier_of_torchvision_or_timm_without_its_head(library):
    source, target = get_resnet("torchvision", "source"), get_resnet(library, "target")
    weights = {"fc.weight": torch.ones(9, 512), "fc.bias": torch.ones(9)}
    load_backbone(target, {**source.body.state_dict(), **weights})
    assert_same_features(source, target)


@pytest.mark.detectron2
@pytest.mark.parametrize("head", ["stem.fc", "linear"])
def test_classifier_of_detectron2_without_its_head(head):
    source, target = get_resnet("detectron2", "source"), get_resnet("timm", "target")
    weights = {f"{head}.weight": torch.ones(9, 512), f"{head}.bias": torch.ones(9)}
    load_backbone(target, {**source.state_dict(), **weights})
    assert_same_features(source, target)


@pytest.mark.parametrize("classes", [0, 10])
def test_swin_classifier_of_timm(classes):
    name = "swin_tiny_patch4_window7_224"
    classifier = shuffle(timm.create_model(name, num_classes=classes, **SWIN))
    backbone = make_swin("timm")
    load_backbone(backbone, classifier.state_dict())
    expected = {
        "body." + name.replace("layers.", "layers_"): tensor
        for name, tensor in classifier.state_dict().items()
        if not name.startswith(("norm.", "head."))
    }
    norms = {n: t for n, t in backbone.state_dict().items() if n.startswith("norms.")}
    assert_state(backbone, {**expected, **norms})


@pytest.mark.detectron2
def test_swin_classifier_of_the_authors():
    source, target = shuffle(make_swin("detectron2")), make_swin("timm")
    head = {"norm.weight": torch.ones(64), "head.weight": torch.ones(9, 64)}
    derived = {"layers.0.blocks.1.attn_mask": torch.ones(9, 4, 4)}
    load_backbone(target, {**source.state_dict(), **head, **derived})
    assert_same_features(source, target, (224, 224))


def authors_convnext_name(name):
    for timm_name, authors in CONVNEXT_NAMES:
        if re.match(timm_name, name):
            return re.sub(timm_name, authors, name)
    raise AssertionError(name)


def test_convnext_of_the_authors():
    source, target = (TimmBackbone("test_convnext", output_norm=1e-6) for _ in range(2))
    weights = {authors_convnext_name(k): v for k, v in shuffle(source).state_dict().items()}
    head = {"norm.weight": torch.ones(64), "head.weight": torch.ones(9, 64)}
    load_backbone(target, {**weights, **head})
    assert_state(target, source.state_dict())


def test_convnext_classifier_of_timm():
    classifier = shuffle(timm.create_model("test_convnext"))
    backbone = TimmBackbone("test_convnext", output_norm=1e-6)
    load_backbone(backbone, classifier.state_dict())
    mine, theirs = backbone.state_dict(), classifier.state_dict()
    assert len(mine) == len([n for n in theirs if not n.startswith("head")]) + 6  # with norms
    for name in ("stem{}0.weight", "stages{}2.downsample.1.bias", "stages{}3.blocks.0.gamma"):
        torch.testing.assert_close(mine["body." + name.format("_")], theirs[name.format(".")])


@pytest.mark.detectron2
def test_vit_of_timm_or_mae_in_a_feature_pyramid():
    from dino_d2.d2.backbones import build_vitdet

    settings = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    vit = shuffle(timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings))
    backbone = build_vitdet(**settings, drop_path=0.0, global_blocks=[1], image_size=64)
    load_backbone(backbone, vit.state_dict())
    dropped = {"cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    loaded = backbone.net.state_dict()
    for name in vit.state_dict().keys() - dropped:
        torch.testing.assert_close(loaded[name], vit.state_dict()[name])


def test_backbone_of_another_depth_is_an_error():
    with torch.device("meta"):
        backbone, weights = TimmBackbone("resnet34"), torchvision.models.resnet18().state_dict()
    with pytest.raises(CheckpointError, match=r"80 missing:\n  backbone\.body\.layer1\.2\.conv1"):
        load_backbone(backbone, weights)


def test_backbone_of_another_width_is_an_error():
    with torch.device("meta"):
        backbone, weights = make_swin("timm"), timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.bias: \(96,\) given, \(8,\)"):
        load_backbone(backbone, weights.state_dict())


def test_norms_inside_a_backbone_must_be_there():
    weights = make_swin("timm").state_dict()
    missing = "body.layers_0.blocks.0.norm1.weight"
    weights = {name: tensor for name, tensor in weights.items() if name != missing}
    with pytest.raises(CheckpointError, match=rf"1 missing:\n  backbone.{missing}$"):
        load_backbone(make_swin("timm"), weights)


def test_another_kind_of_backbone_is_an_error():
    with torch.device("meta"):
        backbone, weights = make_swin("timm"), torchvision.models.resnet18().state_dict()
    with pytest.raises(CheckpointError, match=r"missing:(.|\n)*unexpected:"):
        load_backbone(backbone, weights)


MMDETECTION_NAMES = [
    (r"^layers\.", "stages."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
]


def mmdetection_merges(x, norm, reduction):
    """(B, h, w, C) -> (B, h * w / 4, 2 C) by `unfold`, as mmdetection does it."""
    patches = functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    patches = functional.layer_norm(patches, patches.shape[-1:], *norm)
    return functional.linear(patches, reduction)


@pytest.mark.detectron2
@torch.no_grad()
def test_swin_of_mmdetection():
    swin = shuffle(make_swin("detectron2"))
    wanted = {f"backbone.{name}": tensor for name, tensor in swin.state_dict().items()}
    theirs = {"bbox_head.0.weight": torch.ones(1)}
    for name, tensor in swin.state_dict().items():
        for pattern, replacement in MMDETECTION_NAMES:
            name = re.sub(pattern, replacement, name)
        theirs[f"backbone.{name}"] = torch.randn(tensor.shape) if "downsample" in name else tensor
    ours = from_mmdetection(theirs)
    assert ours.pop("bbox_head.0.weight") == 1
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[n], wanted[n]) for n in ours if "downsample" not in n)
    swin.load_state_dict({name.removeprefix("backbone."): t for name, t in ours.items()})
    x = torch.randn(2, 4, 6, 8)
    prefix = "backbone.stages.0.downsample."
    norm = theirs[f"{prefix}norm.weight"], theirs[f"{prefix}norm.bias"]
    expected = mmdetection_merges(x, norm, theirs[f"{prefix}reduction.weight"])
    merged = swin.layers[0].downsample(x.flatten(1, 2), 4, 6)
    torch.testing.assert_close(merged, expected)


def test_other_backbones_of_mmdetection_stay():
    weights = {"backbone.layer1.0.downsample.0.weight": torch.randn(3, 8)}
    assert from_mmdetection(weights) == weights
