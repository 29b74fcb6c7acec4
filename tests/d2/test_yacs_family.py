"""Every registered detector from a yacs config of keys."""

import pytest
import torch
from detectron2_inputs import make_input
from tiny import NUM_CLASSES

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]

KEYS = {
    "DINO": "DINO",
    "CoDETR": "CO_DETR",
    "DNDETR": "DN_DETR",
    "DABDETR": "DAB_DETR",
    "DABDeformableDETR": "DAB_DEFORMABLE_DETR",
    "DeformableDETR": "DEFORMABLE_DETR",
}
SMALL = {  # further arguments of the builders become keys, too
    "NUM_CLASSES": NUM_CLASSES,
    "NUM_QUERIES": 12,
    "NUM_DETECTIONS": 6,
    "EMBED_DIM": 32,
    "NUM_HEADS": 4,
    "FFN_DIM": 48,
    "ENCODER_LAYERS": 1,
    "DECODER_LAYERS": 2,
}
WIDTHS = ("EMBED_DIM", "NUM_HEADS", "FFN_DIM")  # Co-DETR's keys have none of them
architectures = pytest.mark.parametrize("architecture", KEYS)


def build(architecture, **settings):
    """A small detector on a small ResNet."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from dino_d2.d2 import add_dino_d2_config

    cfg = get_cfg()
    add_dino_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    node = cfg.MODEL[KEYS[architecture]]
    small = {key: value for key, value in SMALL.items() if key in node or key not in WIDTHS}
    node.update({**(small if architecture == "CoDETR" else SMALL), **settings})
    cfg.MODEL.RESNETS.OUT_FEATURES = node.IN_FEATURES
    return build_model(cfg)


@architectures
def test_build_model_makes_what_the_keys_say(architecture):
    model = build(architecture)
    detector = model.detector
    assert type(model).__name__ == architecture
    assert model.num_classes == NUM_CLASSES
    assert model.num_detections == 6
    assert len(detector.decoder.layers) == 2
    dense = architecture in ("DNDETR", "DABDETR")
    fine = ("res2",) if architecture == "CoDETR" else ()
    expected = ("res5",) if dense else (*fine, "res3", "res4", "res5")
    assert detector.neck.in_features == expected
    assert len(detector.neck.projections) == (1 if dense else 4 + len(fine))
    denoises = architecture in ("DINO", "DNDETR", "CoDETR")
    assert (detector.denoising is not None) == denoises


@architectures
def test_it_trains_and_finds(architecture):
    model, inputs = build(architecture), [make_input(), make_input(48, 80, boxes=())]
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        results = model.eval()(inputs)
    for result, source in zip(results, inputs, strict=True):
        assert result["instances"].image_size == (source["height"], source["width"])
        assert 0 < len(result["instances"]) <= 6


def test_keys_of_dn_detr():
    assert build("DNDETR", DENOISING_GROUPS=0).detector.denoising is None
    assert build("DNDETR", DENOISING_GROUPS=7).detector.denoising.num_groups == 7
    detector = build("DNDETR", NUM_PATTERNS=3).detector
    assert detector.query_source.patterns.shape == (3, 32)
    levels = {"IN_FEATURES": ["res3", "res4", "res5"], "NUM_LEVELS": 4}
    detector = build("DNDETR", DEFORMABLE=True, **levels).detector
    assert type(detector.decoder.layers[0]).__name__ == "DeformableDecoderLayer"
    detector = build("DNDETR", **levels).detector
    assert type(detector.encoder).__name__ == "DeformableEncoder"
    assert detector.decoder.layers[0].level.weight.shape == (4, 32)


def test_keys_of_co_detr():
    model = build("CoDETR")
    assert list(model.detector.co_heads.heads) == ["faster_rcnn", "atss"]
    assert model.suppression.iou_threshold == 0.8
    model = build("CoDETR", CO_HEADS=["fcos"], SOFT_NMS=0)
    assert list(model.detector.co_heads.heads) == ["fcos"]
    assert model.suppression is None
    model = build("CoDETR", NUM_DETECTIONS=None, CO_HEAD_WEIGHT=0.5, DETECT_BY="atss")
    assert (model.num_detections, model.detect_by) == (300, "atss")
    assert model.detector.co_heads.weights["atss"] == 0.5 * 2
    keys = {"IN_FEATURES": ["res3", "res4", "res5"], "NUM_DETECTIONS": None, "CO_HEADS": []}
    model = build("CoDETR", BASE="deformable_detr", NUM_QUERIES=None, **keys)
    detector = model.detector
    assert (model.num_detections, detector.query_source.num_queries) == (100, 300)
    assert len(detector.neck.projections) == 4
    assert detector.co_heads is None
    assert type(detector.query_source).__name__ == "TwoStageQueries"
    with pytest.raises(ValueError, match=r"MODEL.CO_DETR.BASE must be in .*'deformable_detr'"):
        build("CoDETR", BASE="detr")


def test_detections_of_dn_detr_are_as_many_as_published():
    levels = {"IN_FEATURES": ["res3", "res4", "res5"], "NUM_LEVELS": 4}
    assert build("DNDETR", NUM_DETECTIONS=None).num_detections == 300
    assert build("DNDETR", NUM_DETECTIONS=None, DEFORMABLE=True, **levels).num_detections == 100
    assert build("DNDETR", NUM_DETECTIONS=7, DEFORMABLE=True, **levels).num_detections == 7


def test_keys_of_deformable_detr():
    detector = build("DeformableDETR").detector
    assert not detector.decoder.refine
    assert len(detector.heads.box_heads) == 1
    detector = build("DeformableDETR", BOX_REFINEMENT=True, TWO_STAGE=True).detector
    assert detector.decoder.refine
    assert len(detector.heads.box_heads) == 2
    assert type(detector.query_source).__name__ == "TwoStageQueries"


@architectures
def test_a_misspelt_key_is_an_error(architecture):
    with pytest.raises(TypeError, match="num_querys"):
        build(architecture, NUM_QUERYS=3)
