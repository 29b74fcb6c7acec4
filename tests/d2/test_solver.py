"""Learning rates that shrink towards the first layer of a ViT."""

import pytest
from tiny import StubBackbone, tiny_dino

from dino_d2.backbones import build_eva02

pytestmark = pytest.mark.detectron2

DEPTH = 3


@pytest.fixture(scope="module")
def factors():
    """By name, for the parameters of a Detectron2 model with an EVA-02."""
    from dino_d2.d2 import DINO
    from dino_d2.d2.solver import LayerDecayLR

    detector = tiny_dino()
    assert isinstance(detector.backbone, StubBackbone)
    detector.backbone = build_eva02(64, DEPTH, 1, 2, (1,), out_channels=32)
    names = [name for name, _ in DINO(detector=detector).named_parameters()]
    return {name: LayerDecayLR(0.8, DEPTH)(name) for name in names}


@pytest.mark.parametrize(
    ("part", "power"),
    [
        ("backbone.net.patch_embed.", 4),
        ("backbone.net.pos_embed", 4),
        *((f"backbone.net.blocks.{i}.", 3 - i) for i in range(DEPTH)),
        ("backbone.net.out_norm.", 0),
        ("backbone.p2.", 0),
        ("encoder.layers.1.", 0),
    ],
)
def test_layers_of_a_vit(factors, part, power):
    found = {factor for name, factor in factors.items() if name.startswith(f"detector.{part}")}
    assert list(found) == [pytest.approx(0.8**power)]
