"""EVA-02 as the backbone of a Detectron2 model, from a config."""

import pytest
import torch
from detectron2_inputs import make_input
from tiny import NUM_CLASSES, SETTINGS

pytestmark = pytest.mark.detectron2


@pytest.fixture
def model():
    from detectron2.config import LazyCall, instantiate

    from dino_d2.backbones import build_eva02
    from dino_d2.d2 import DINO
    from dino_d2.models import build_dino

    strides = [f"stride{stride}" for stride in (4, 8, 16, 32, 64)]
    settings = {**SETTINGS, "in_features": strides, "num_levels": 5}
    backbone = LazyCall(build_eva02)(
        embed_dim=64, depth=2, num_heads=1, window_size=2, global_blocks=[1], recompute=True
    )
    config = LazyCall(DINO)(detector=LazyCall(build_dino)(backbone=backbone, **settings))
    return instantiate(config)


def test_images_are_padded_for_the_pyramid(model):
    inputs = [make_input(70, 101), make_input(64, 90)]
    assert model.preprocess_image(inputs).tensor.shape[2:] == (96, 128)
    with torch.no_grad():
        results = model.eval()(inputs)
    assert [r["instances"].image_size for r in results] == [(70, 101), (64, 90)]


def test_training_reaches_the_whole_backbone(model):
    losses = model([make_input(64, 96, classes=[NUM_CLASSES - 1])])
    sum(losses.values()).backward()
    unreached = [n for n, p in model.detector.backbone.named_parameters() if p.grad is None]
    assert unreached == []
