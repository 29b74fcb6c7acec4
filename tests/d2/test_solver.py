"""Learning rates: towards the first layer of a ViT, for other batches, while they warm up."""

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


def make(*settings):
    from dino_d2 import model_zoo
    from dino_d2.d2 import apply_overrides

    return apply_overrides(model_zoo.get_config("dino/dino_r50_4scale_12ep"), list(settings))


def test_rate_and_iterations_follow_the_batch():
    """The number of images stays, and so do the milestones, which are shares of the whole."""
    from dino_d2.d2.solver import build_schedule, scale_to_batch

    given = make(
        "train.reference_batch=16",
        "dataloader.train.total_batch_size=64",
        "train.warmup=100",
        "train.instability_period=7",
    )
    cfg = scale_to_batch(given)
    assert cfg.optimizer.lr == pytest.approx(4e-4)
    assert cfg.optimizer.params.base_lr == cfg.optimizer.lr
    assert cfg.train.max_iter == 12 * 7393 // 4
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 1848
    assert (cfg.train.warmup, cfg.train.instability_period) == (25, 2)
    assert given.optimizer.lr == 1e-4
    assert [build_schedule(cfg)(where) for where in (0.9, 0.92)] == pytest.approx([1, 0.1])


@pytest.mark.parametrize("settings", [[], ["train.reference_batch=16"]])
def test_the_batch_of_the_recipe_changes_nothing(settings):
    from dino_d2.d2.solver import scale_to_batch

    cfg = make(*settings)
    assert scale_to_batch(cfg) is cfg


def test_smaller_batches_make_more_steps():
    from dino_d2.d2.solver import scale_to_batch

    settings = ["train.reference_batch=16", "dataloader.train.total_batch_size=2"]
    cfg = scale_to_batch(make(*settings, "train.eval_period=0"))
    assert (cfg.optimizer.lr, cfg.train.max_iter) == (pytest.approx(1.25e-5), 12 * 7393 * 8)
    assert cfg.train.eval_period == 0


def test_the_rate_warms_up():
    from dino_d2.d2.solver import build_schedule

    schedule = build_schedule(make("train.warmup=100", "train.max_iter=1000"))
    rates = [schedule(iteration / 1000) for iteration in (0, 50, 100, 500, 950)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1])


def test_warming_up_for_longer_than_training_is_an_error():
    from dino_d2.d2.solver import build_schedule

    with pytest.raises(ValueError, match=r"train\.warmup=10 is not below max_iter=10"):
        build_schedule(make("train.warmup=10", "train.max_iter=10"))
