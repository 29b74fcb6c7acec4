"""Detectron2's ResNet with a dilated last stage."""

import pytest
import torch
import torchvision

from dino_d2.backbones import TorchvisionBackbone
from dino_d2.checkpoint import load_backbone

pytestmark = pytest.mark.detectron2


def build(depth, **settings):
    from dino_d2.d2.backbones import build_resnet_dc5

    return build_resnet_dc5(depth, **settings)


@torch.no_grad()
def test_dc5_equals_torchvisions(one_thread):
    dilated = [False, False, True]
    model = torchvision.models.resnet50(replace_stride_with_dilation=dilated).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    backbone = build(50).eval()
    classifier = ("fc.weight", "fc.bias")
    weights = {n: t for n, t in model.state_dict().items() if n not in classifier}
    load_backbone(backbone, weights)
    x = images = torch.randn(1, 3, 40, 52)
    for name, child in model.named_children():
        if name not in ("avgpool", "fc"):
            x = child(x)
    (feature,) = backbone(images).values()
    assert feature.shape == (1, 2048, 3, 4)
    torch.testing.assert_close(feature, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "blocks"), [(50, 6), (101, 23)])
def test_dc5_has_one_map_of_stride_16(depth, blocks):
    with torch.device("meta"):
        backbone = build(depth)
        (feature,) = backbone(torch.empty(1, 3, 64, 96)).values()
    ((name, shape),) = backbone.output_shape().items()
    assert (name, shape.channels, shape.stride) == ("res5", 2048, 16)
    assert feature.shape == (1, 2048, 4, 6)
    assert len(backbone.res4) == blocks


@pytest.mark.parametrize("freeze_at", [0, 2, 3])
def test_dc5_freezes_first_stages(freeze_at):
    with torch.device("meta"):
        backbone = build(50, freeze_at=freeze_at)
    stages = [backbone.stem, backbone.res2, backbone.res3, backbone.res5]
    frozen = [not any(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert frozen == [freeze_at > 0, freeze_at > 1, freeze_at > 2, False]


def test_dc5_has_the_weights_of_torchvisions():
    """So that ImageNet weights and published checkpoints load."""
    with torch.device("meta"):
        theirs = TorchvisionBackbone("resnet50", (16,), norm="FrozenBN", dilated=True)
        ours = build(50)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
