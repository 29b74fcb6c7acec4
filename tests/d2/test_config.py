"""Overrides that are checked, and what the shared parts of configs mean."""

import re

import pytest
import torch
from tiny import tiny_detector

from dino_d2 import model_zoo

pytestmark = pytest.mark.detectron2


@pytest.fixture
def cfg():
    return model_zoo.get_config("dino/dino_r50_4scale_12ep")


def override(cfg, *overrides):
    from dino_d2.d2 import apply_overrides

    return apply_overrides(cfg, list(overrides))


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("train.max_iter=7", "train.max_iter", 7),
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("train.amp.enabled=true", "train.amp.enabled", True),
        ("train.clip_grad.max_norm=null", "train.clip_grad.max_norm", None),
        ("+train.max_iter=7", "train.max_iter", 7),
        ("dataloader.train.dataset.names=[a,b]", "dataloader.train.dataset.names", ["a", "b"]),
        ("model.detector.in_features.1=res2", "model.detector.in_features.1", "res2"),
        (
            "dataloader.train.mapper.augmentations.1.prob=0.25",
            "dataloader.train.mapper.augmentations.1.prob",
            0.25,
        ),
    ],
)
def test_overrides_apply(cfg, given, key, value):
    from omegaconf import OmegaConf

    assert OmegaConf.select(override(cfg, given), key) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.detector.num_queries", 300),  # a parameter of build_dino
        ("model.vis_period", 10),  # of a configurable class
        ("model.detector.backbone.num_classes", 5),  # of a class
        ("dataloader.train.aspect_ratio_grouping", False),  # of a configurable function
    ],
)
def test_overrides_may_add_what_the_signature_knows(cfg, key, value):
    from omegaconf import OmegaConf

    assert OmegaConf.select(cfg, key) is None
    assert OmegaConf.select(override(cfg, f"{key}={value}"), key) == value


def test_an_overridden_model_is_built_accordingly(cfg):
    from detectron2.config import instantiate

    small = ["num_classes=3", "num_queries=7", "encoder_layers=1", "decoder_layers=2"]
    small = [f"model.detector.{setting}" for setting in small]
    model = instantiate(override(cfg, *small, "model.num_detections=5").model)
    assert model.num_classes == model.detector.denoising.num_classes == 3
    assert len(model.detector.decoder.layers) == 2
    assert model.num_detections == 5


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.max_itr", "max_iter"),
        ("trian.max_iter", "train"),
        ("model.detector.num_clases", "num_classes"),
        ("model.detector.num_query", "num_queries"),
        ("model.detectr.num_classes", "detector"),
        ("model.vis_perod", "vis_period"),
        ("optimizer.weight_decy", "weight_decay"),
        ("train.amp.enable", "enabled"),
        ("dataloader.train.dataset.name", "names"),
        ("dataloader.train.mapper.augmentations.1.pro", "prob"),
    ],
)
def test_a_misspelt_key_is_an_error_that_suggests_the_right_one(cfg, key, suggestion):
    with pytest.raises(KeyError, match=f"{key}.*did you mean '{suggestion}'"):
        override(cfg, f"{key}=1")


@pytest.mark.parametrize("name", [n for n in model_zoo.list_configs() if n.endswith("_shapes")])
def test_a_misspelt_argument_is_found_before_anything_is_built(name):
    base = ".base" if name.startswith("co_detr/") else ""
    key = f"model.detector{base}.encoder_layrs"
    with pytest.raises(KeyError, match=f"{key}.*did you mean 'encoder_layers'"):
        override(model_zoo.get_config(name), f"{key}=1")


def test_without_a_similar_key_all_are_listed(cfg):
    with pytest.raises(KeyError, match="known: dtype, enabled"):
        override(cfg, "train.amp.xyz=1")


@pytest.mark.parametrize(
    "key",
    [
        "train.seed.x",
        "train.seed.x.y",
        "dataloader.train.mapper.augmentations.first.prob",
        "dataloader.train.mapper.augmentations.9.prob",
        "dataloader.train.mapper.augmentations.9",
        "model.detector.in_features.3",
        "model.detector.in_features.last",
    ],
)
def test_a_key_below_a_value_or_beyond_a_list_is_an_error(cfg, key):
    with pytest.raises(KeyError, match=key):
        override(cfg, f"{key}=1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train.max_iter=soon", "train.max_iter=soon must be a number, such as 88716"),
        ("train.max_iter=true", "train.max_iter=True must be a number"),
        ("train.seed=[1]", "train.seed=[1] must be a number"),
        ("train.output_dir=7", "train.output_dir=7 must be a text"),
        ("train.amp.enabled=1", "train.amp.enabled=1 must be true or false, such as False"),
        ("model.detector.in_features.0=3", "in_features.0=3 must be a text"),
    ],
)
def test_a_value_of_another_kind_is_an_error(cfg, given, message):
    from dino_d2.d2.config import ConfigError

    with pytest.raises(ConfigError, match=re.escape(message)):
        override(cfg, given)


def test_one_bad_override_leaves_everything_as_it_was(cfg):
    from omegaconf import OmegaConf

    before = OmegaConf.to_container(cfg)
    with pytest.raises(KeyError):
        override(cfg, "train.max_iter=7", "optimizer.lr=3", "train.typo=1")
    assert OmegaConf.to_container(cfg) == before


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("detector.backbone.res2.0.conv1.weight", 0.1),
        ("backbone.stem.conv1.weight", 0.1),
        ("detector.neck.projections.0.weight", 1),
        ("detector.encoder.backbone_like.weight", 1),
        ("", 1),
    ],
)
def test_backbone_lr_is_for_the_backbone_only(name, factor):
    from dino_d2.d2.solver import BackboneLR

    assert BackboneLR(0.1)(name) == factor


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("detector.encoder.layers.0.attention.sampling_offsets.weight", 0.3),
        ("detector.decoder.layers.1.cross_attention.sampling_offsets.bias", 0.3),
        ("detector.query_source.reference.weight", 0.3),
        ("detector.decoder.layers.1.cross_attention.attention_weights.weight", 1),
        ("detector.query_source.positions", 1),
        ("detector.backbone.sampling_offsets.weight", 0.1),
    ],
)
def test_sampling_offsets_and_reference_points_may_have_a_rate_of_their_own(name, factor):
    from dino_d2.d2.solver import BackboneLR

    assert BackboneLR(0.1, sampling=0.3)(name) == factor


def learning_rates(cfg, name="dino"):
    """By parameter name, of the config's optimizer on a tiny model."""
    from detectron2.config import instantiate

    from dino_d2.d2 import DetrMetaArch

    model = DetrMetaArch(detector=tiny_detector(name, torch.float32))
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}


def test_the_shipped_optimizer_trains_the_backbone_at_a_tenth(cfg):
    for name, rate in learning_rates(cfg).items():
        assert rate == pytest.approx(1e-5 if name.startswith("detector.backbone.") else 1e-4)


@pytest.mark.parametrize("name", ["deformable_detr", "deformable_detr_two_stage"])
def test_deformable_detr_samples_at_a_tenth_of_the_rate(name):
    rates = learning_rates(model_zoo.get_config("deformable_detr/deformable_detr_r50_50ep"), name)
    slow = r"\.backbone\.|\.sampling_offsets\.|\.query_source\.reference\."
    for parameter, rate in rates.items():
        assert rate == pytest.approx(2e-5 if re.search(slow, parameter) else 2e-4), parameter


def test_the_learning_rate_is_set_in_one_place(cfg):
    rates = learning_rates(override(cfg, "optimizer.lr=1e-2"))
    assert sorted(set(rates.values())) == pytest.approx([1e-3, 1e-2])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("dino/dino_r50_4scale_12ep", 11 / 12),
        ("dino/dino_r50_4scale_24ep", 20 / 24),
        ("dino/dino_shapes", 11 / 12),
        ("deformable_detr/deformable_detr_r50_50ep", 40 / 50),
    ],
)
def test_the_learning_rate_drops_where_the_recipe_says(name, steps):
    from detectron2.config import instantiate

    schedule = instantiate(model_zoo.get_config(name).lr_multiplier)
    assert [schedule(where) for where in (0, steps - 1e-4)] == [1, 1]
    assert [schedule(where) for where in (steps, 1 - 1e-4)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("name", ["dab_detr/dab_detr_shapes", "dn_detr/dn_detr_shapes"])
def test_small_dense_detectors_warm_up(name):
    from detectron2.config import instantiate

    schedule = instantiate(model_zoo.get_config(name).lr_multiplier)
    assert [schedule(where) for where in (0, 0.1, 0.2, 0.9)] == pytest.approx([0.01, 0.505, 1, 1])
    assert schedule(0.99) == pytest.approx(0.1)


def values(node):
    """Everything in a config, with the names of what it builds."""
    from detectron2.utils.registry import _convert_target_to_string, locate

    if isinstance(node, dict):
        return {key: values(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [values(value) for value in node]
    if isinstance(node, str) and "dino_d2." in node:
        node = locate(node)
    return _convert_target_to_string(node) if callable(node) else node


def test_a_saved_config_loads_again(cfg, tmp_path):
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    override(cfg, "model.detector.num_queries=7", "train.max_iter=3")
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    loaded = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert loaded.model.detector.num_queries == 7
    first, second = (OmegaConf.to_container(c, resolve=True) for c in (cfg, loaded))
    assert values(first) == values(second)


@pytest.mark.parametrize(
    ("key", "builder"),
    [
        ("DINO", "dino"),
        ("DN_DETR", "dn_detr"),
        ("DAB_DETR", "dab_detr"),
        ("DAB_DEFORMABLE_DETR", "dab_deformable_detr"),
        ("DEFORMABLE_DETR", "deformable_detr"),
    ],
)
def test_yacs_keys_are_the_defaults_of_the_model(key, builder):
    import inspect

    from detectron2.config import get_cfg

    from dino_d2 import models
    from dino_d2.d2 import add_dino_d2_config

    cfg = get_cfg()
    add_dino_d2_config(cfg)
    keys = dict(cfg.MODEL[key])
    keys.pop("DENOISING_QUERIES", None)  # the builder's default depends on its other arguments
    assert (keys.pop("IN_FEATURES"), keys.pop("NUM_DETECTIONS")) == (
        ["res5"] if keys["NUM_LEVELS"] == 1 else ["res3", "res4", "res5"],
        {"DINO": 300, "DN_DETR": None, "DAB_DETR": 300}.get(key, 100),
    )
    parameters = inspect.signature(getattr(models, f"build_{builder}")).parameters
    assert keys == {name: parameters[name.lower()].default for name in keys}
