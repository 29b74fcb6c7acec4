"""Co-DETR's configs against the published ones."""

import copy
import re

import pytest
from test_model_zoo import COCO_EPOCH, DROP, NAMES, build, build_optimizer_config, load

pytestmark = pytest.mark.detectron2
__all__ = ["build"]  # a fixture

# Trained parameters of the official models.
OFFICIAL = {
    "co_deformable_detr_r50_12ep": 64_854_374,
    "co_deformable_detr_swin_tiny_224_12ep": 65_619_808,
    "co_deformable_detr_swin_tiny_224_36ep": 65_619_808,
    "co_deformable_detr_swin_small_224_12ep": 86_937_712,
    "co_deformable_detr_swin_small_224_36ep": 86_937_712,
    "co_deformable_detr_swin_base_384_12ep": 125_683_934,
    "co_deformable_detr_swin_base_384_36ep": 125_683_934,
    "co_deformable_detr_swin_large_384_12ep": 235_413_658,
    "co_deformable_detr_swin_large_384_900queries_36ep": 235_567_258,
    "co_dino_r50_5scale_12ep": 64_928_485,
    "co_dino_r50_5scale_lsj_12ep": 64_928_485,
    "co_dino_r50_5scale_lsj_36ep": 64_928_485,
    "co_dino_r50_5scale_9enc_lsj_12ep": 68_849_029,
    "co_dino_r50_5scale_9enc_lsj_36ep": 68_849_029,
    "co_dino_swin_large_384_5scale_12ep": 235_471_769,
    "co_dino_swin_large_384_5scale_24ep": 235_471_769,
    "co_dino_swin_large_384_5scale_36ep": 235_471_769,
    "co_dino_swin_large_384_5scale_lsj_12ep": 235_471_769,
    "co_dino_swin_large_384_5scale_lsj_24ep": 235_471_769,
    "co_dino_swin_large_384_5scale_lsj_36ep": 235_471_769,
    "co_dino_swin_large_384_5scale_o365_16ep": 235_471_769,
    "co_dino_vit_large_5scale_o365_12ep": 365_367_657,
}
BASES = {  # of the ablations: the query branch, without the maps and queries of the heads
    "co_deformable_detr_r50_12ep_k0": 47_594_380,
    "co_dino_r50_5scale_12ep_k0": 48_064_780,
}
DROP_PATH = {
    "deformable_detr_swin_tiny_224_36": 0.3,
    "deformable_detr_swin_small_224_36": 0.4,
    "deformable_detr_swin_base_384_36": 0.4,
    "deformable_detr_swin_large_384_12": 0.3,
    "deformable_detr_swin_large_384_900queries_36": 0.6,
    "dino_swin_large_384_5scale_36": 0.6,
    "dino_swin_large_384_5scale_lsj_36": 0.5,
}
ON_COCO = [*OFFICIAL, "co_dino_r50_5scale_12ep_k1", "co_deformable_detr_r50_12ep_k1"]


ON_LVIS = {  # trained parameters with 1203 classes, without COCO's 80
    "co_dino_r50_5scale_lvis_12ep": 75_580_140,
    "co_dino_r50_5scale_lsj_lvis_12ep": 75_580_140,
    "co_dino_swin_large_384_5scale_lsj_lvis_36ep": 246_123_424,
    "co_dino_swin_large_384_5scale_o365_lsj_lvis_16ep": 246_123_424,
    "co_dino_vit_large_5scale_o365_lsj_lvis_16ep": 374_877_868,
}


def find(stem):
    return load(f"co_detr/{stem}")


def test_every_published_config_is_there():
    stems = {*OFFICIAL, *ON_LVIS, *BASES, *ON_COCO, "co_dino_shapes", "co_deformable_detr_shapes"}
    assert {f"co_detr/{stem}" for stem in stems} <= set(NAMES)


@pytest.mark.parametrize("stem", [*OFFICIAL, *ON_LVIS])
def test_number_of_parameters(stem, build):
    expected = {**OFFICIAL, **ON_LVIS}[stem]
    cfg = copy.deepcopy(find(stem).model)
    cfg.detector.base.pop("federated", None)  # reads LVIS's frequencies, as test_datasets.py does
    model = build(cfg)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("stem", BASES)
def test_without_heads_only_the_base_is_left(stem, build):
    detector = build(find(stem).model).detector
    assert detector.co_heads is None
    affine = 53_120  # of ResNet-50's frozen batch norm, which counts there
    assert sum(p.numel() for p in detector.parameters()) + affine == BASES[stem]


@pytest.mark.parametrize("stem", ON_COCO)
def test_recipe(stem, build):
    from detectron2.config import instantiate

    cfg = find(stem)
    epochs = int(re.search(r"_(\d+)ep", stem)[1])
    assert cfg.train.max_iter == epochs * COCO_EPOCH
    assert cfg.train.output_dir == f"./output/{stem}"
    rate = {"swin_large_384_5scale_o365": 1e-4, "vit": 5e-5}
    rate = next((value for key, value in rate.items() if key in stem), 2e-4)
    assert cfg.optimizer.lr == rate
    swin_decay = 0.05 if "deformable" in stem and "swin" in stem else 1e-4
    assert cfg.optimizer.weight_decay == (0.01 if "vit" in stem else swin_decay)
    drop = {16: 8}.get(epochs, 7 if "vit" in stem else DROP.get(epochs))
    multiplier = instantiate(cfg.lr_multiplier)
    at = [multiplier((drop * COCO_EPOCH + i) / cfg.train.max_iter) for i in (-1, 0)]
    assert at == pytest.approx([1, 0.1])
    groups = instantiate(build_optimizer_config(cfg, build(cfg.model))).param_groups
    rates = {group["lr"] for group in groups}
    assert max(rates) == pytest.approx(rate)
    if "vit" not in stem:
        assert min(rates) == pytest.approx(rate / 10)


@pytest.mark.parametrize("stem", ON_COCO)
def test_suppression_as_published(stem, build):
    model, cfg = build(find(stem).model), find(stem)
    if "deformable" in stem:
        assert model.suppression is None
        assert model.num_detections == (300 if "900" in stem else 100)
        return
    assert (model.suppression.kind, model.suppression.iou_threshold) == ("soft_nms", 0.8)
    assert model.num_detections == (1000 if "vit" in stem else 300)
    assert cfg.dataloader.evaluator.unsuppressed


@pytest.mark.parametrize("part", DROP_PATH)
def test_drop_path(part):
    assert find(f"co_{part}ep").model.detector.base.backbone.drop_path_rate == DROP_PATH[part]


@pytest.mark.parametrize("backbone", ["r50", "swin_large_384"])
def test_large_scale_jitter(backbone, build):
    dataloader = find(f"co_dino_{backbone}_5scale_lsj_12ep").dataloader
    size = 1280 if "swin" in backbone else 1024
    assert dataloader.train.mapper.augmentations.size == size
    assert dataloader.test.mapper.augmentations.size == size


def test_heads_by_overrides(build):
    """Overrides merge; they can add a head and leave one out."""
    from dino_d2.d2 import apply_overrides

    cfg = copy.deepcopy(find("co_dino_r50_5scale_12ep"))
    key = "model.detector.co_heads"
    cfg = apply_overrides(cfg, [f"{key}.faster_rcnn=null", f"{key}={{fcos:{{num_convs:2}}}}"])
    detector = build(cfg.model).detector
    assert list(detector.co_heads.heads) == ["atss", "fcos"]
    assert len(detector.co_heads.heads["fcos"].towers.box_tower) == 2


@pytest.mark.parametrize("agnostic", [False, True])
def test_weights_for_other_classes_fit_but_for_those_named(agnostic):
    """As from Objects365; what knows no classes is taken over."""
    import torch
    from tiny import tiny_detector

    from dino_d2.checkpoint import load_weights
    from dino_d2.d2 import CoDETR

    heads = {"faster_rcnn": {"class_agnostic": agnostic}, "atss": {}}
    source, model = (
        CoDETR(detector=tiny_detector("co_dino", torch.float32, num_classes=k, co_heads=heads))
        for k in (9, 5)
    )
    before = model.state_dict()
    skip = find("co_dino_vit_large_5scale_o365_12ep").train.init_skip
    load_weights(model, source.state_dict(), skip=list(skip))
    after, given = model.state_dict(), source.state_dict()
    for name, tensor in after.items():
        if tensor.shape == given[name].shape and "faster_rcnn.box_head" not in name:
            assert torch.equal(tensor, given[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_evaluation_on_lvis_as_published():
    cfg = find("co_dino_vit_large_5scale_o365_lsj_lvis_16ep")
    assert cfg.dataloader.evaluator.max_detections == cfg.model.num_detections == 1000
    assert cfg.dataloader.evaluator.unsuppressed
