import pytest
import torch
from synchronisations import what_a_step_waits_for
from tiny import (
    CO_FAMILY,
    CO_HEADS,
    NUM_CLASSES,
    SETTINGS,
    StubBackbone,
    add_noise,
    tiny_batch,
    tiny_detector,
    tiny_targets,
)

from dino_d2.co_heads import ATSS, faster_rcnn
from dino_d2.co_heads import CO_HEADS as REGISTRY
from dino_d2.models import build_co_deformable_base, build_co_detr, build_co_dino_base, build_dino

pytestmark = pytest.mark.usefixtures("one_thread")
DETECTORS = pytest.mark.parametrize("name", CO_FAMILY)
COUNTS = pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)], ids=["3+1", "0+2", "0"])


def losses_of(model, counts=(3, 1), seed=0):
    torch.manual_seed(seed)
    images, mask = tiny_batch()
    mask[1, :, 80:] = True
    return model.train()(images, mask, tiny_targets(*counts))


@DETECTORS
@COUNTS
def test_one_pass_and_a_pass_for_each_head_agree(name, counts):
    model = tiny_detector(name)
    model.co_heads.one_pass = False
    expected = losses_of(model, counts)
    model.co_heads.one_pass = True
    losses = losses_of(model, counts)
    assert list(losses) == list(expected)
    for loss_name, loss in losses.items():
        torch.testing.assert_close(loss, expected[loss_name])


@DETECTORS
@COUNTS
def test_every_parameter_has_a_gradient(name, counts):
    """Distributed training waits for all of them, be they zero."""
    model = tiny_detector(name)
    sum(losses_of(model, counts).values()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@DETECTORS
def test_mixed_precision(name):
    """Losses are computed in float32, whatever the layers compute in."""
    model = tiny_detector(name, torch.float32)
    images, mask = tiny_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, mask, tiny_targets(3, 1))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_what_a_step_waits_for(monkeypatch):
    """Sizes of images, counts of boxes and the matching cost; suppression waits besides."""
    monkeypatch.setattr(faster_rcnn, "batched_nms", lambda _, scores, *__: scores.argsort())
    waits = what_a_step_waits_for(tiny_detector("co_dino").train(), 3, 1)
    assert set(waits) == {"cpu", "tolist", "aten.nonzero.default"}
    assert waits.count("cpu") == 1


@DETECTORS
def test_they_agree_where_queries_are_hidden(name):
    model = tiny_detector(name)
    for queries in model.co_heads.queries.values():
        queries.pad_with_negatives = False
    one, each = [], []
    for one_pass, store in ((True, one), (False, each)):
        model.co_heads.one_pass = one_pass
        store += losses_of(model).values()
    torch.testing.assert_close(one, each)


def test_no_heads_are_the_detector_itself():
    torch.manual_seed(0)
    base = build_dino(StubBackbone(), **SETTINGS).double()
    names = list(base.state_dict())
    assert build_co_detr(base, {}) is base
    assert build_co_detr(base, {"atss": None}) is base  # as an override can say
    assert list(base.state_dict()) == names
    assert base.co_heads is None
    losses = losses_of(add_noise(base))
    with_heads = losses_of(build_co_detr(base, ["atss"]).double())
    assert set(losses) < set(with_heads)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, with_heads[name])


def test_evaluation_leaves_the_heads_out():
    model = tiny_detector("co_dino").eval()
    model.co_heads.forward = None  # would fail
    predictions = model(*tiny_batch())
    assert predictions.boxes.shape[2] == SETTINGS["num_queries"]
    assert set(model(*tiny_batch(), tiny_targets(2, 1))) == set(
        tiny_detector("dino").eval()(*tiny_batch(), tiny_targets(2, 1))
    )


@DETECTORS
def test_names_of_the_losses(name):
    losses = losses_of(tiny_detector(name))
    for head in CO_HEADS:
        assert f"loss_class_{head}" in losses
        for kind in ("class", "bbox", "giou"):
            assert f"loss_{kind}_{head}_queries" in losses
            for layer in range(SETTINGS["decoder_layers"] - 1):
                assert f"loss_{kind}_{head}_queries_{layer}" in losses
    assert {"loss_rpn_class_faster_rcnn", "loss_rpn_bbox_faster_rcnn"} <= set(losses)
    assert "loss_centerness_atss" in losses


def test_weights():
    """Heads weigh lambda 2 times the number of decoder layers, and what they are given besides."""
    model = tiny_detector("co_dino")
    of_three = losses_of(model)
    weights = dict(model.co_heads.weights)
    assert model.co_heads.one_pass
    assert weights == dict.fromkeys(CO_HEADS, 2.0 * SETTINGS["decoder_layers"])
    model.co_heads.weights["atss"] = 0.5 * weights["atss"]
    model.co_heads.query_weight = 3.0
    changed = losses_of(model)
    for name in of_three:
        factor = 3.0 if "_queries" in name else 0.5 if name.endswith("_atss") else 1.0
        torch.testing.assert_close(changed[name], factor * of_three[name])
    base = build_dino(StubBackbone(), **{**SETTINGS, "decoder_layers": 5})
    heavy = build_co_detr(base, ["atss"], co_head_weights={"atss": 3.0}, co_head_weight=4.0)
    assert heavy.co_heads.weights == {"atss": 3.0 * 4.0 * 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"co_heads": ["attss"]}, r"no co-head 'attss'; there are \['atss', "),
        ({"co_heads": {"atss": {"layers": 2}}}, "co-head 'atss': .*'layers'"),
        ({"co_heads": ["atss"], "co_head_weights": {"fcos": 2}}, r"\['fcos'\], but .*'atss'"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        build_co_detr(build_dino(StubBackbone(), **SETTINGS), **options)


def test_a_head_of_ones_own(monkeypatch):
    """Registered by a line, named by a config."""

    class Wide(ATSS):
        def __init__(self, embed_dim, num_classes, strides, topk):
            super().__init__(embed_dim, num_classes, strides, num_convs=2, topk=topk)

    monkeypatch.setitem(REGISTRY, "wide", Wide)
    base = build_dino(StubBackbone(), **SETTINGS).double()
    model = build_co_detr(base, {"wide": {"topk": 3}}).double()
    assert "loss_class_wide_queries" in losses_of(model)


@pytest.mark.parametrize("head", CO_HEADS)
def test_detections_of_a_head(head):
    model = tiny_detector("co_dino").eval()
    found = model.detect_by(head, *tiny_batch())
    assert len(found) == 2
    assert found[0].labels.max() < NUM_CLASSES
    assert found[0].boxes.shape == (len(found[0].scores), 4)


def test_detections_of_no_head():
    with pytest.raises(ValueError, match="this detector has none"):
        tiny_detector("dino").detect_by("atss", *tiny_batch())
    with pytest.raises(ValueError, match="no co-head 'rpn'; there are"):
        tiny_detector("co_dino").detect_by("rpn", *tiny_batch())


def test_published_bases():
    small = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20}
    dino = build_co_dino_base(StubBackbone(), ["fine", "coarse"], **small)
    assert len(dino.heads.class_heads) == 2
    assert dino.criterion.quality
    assert len(dino.neck.projections) == 5
    deformable = build_co_deformable_base(StubBackbone(), ["fine", "coarse"], **small)
    assert deformable.query_source.content is not None
    assert deformable.decoder.look_forward_twice
    for model in (dino, deformable):
        assert model.neck.projections[0][0].bias is None


def test_a_detector_that_starts_from_points():
    base = tiny_detector("deformable_detr")
    with pytest.raises(ValueError, match="starts from points"):
        build_co_detr(base, ["atss"], one_pass=True)
    model = build_co_detr(base, ["atss"]).double()
    assert not model.co_heads.one_pass
    assert all(loss.isfinite() for loss in losses_of(model).values())


def test_strides_of_the_heads():
    """The stub has strides 8 and 16; the third level and the heads' own follow."""
    model = tiny_detector("co_dino")
    assert model.co_heads.heads["atss"].anchors.strides == (8, 16, 32, 64)
    single = tiny_detector("co_dab_detr")
    assert single.co_heads.heads["atss"].anchors.strides == (8, 16, 32)
    memory = single._encode(*tiny_batch())
    shapes = [m.shape[-2:] for m in single.co_heads.pyramid(memory)]
    assert shapes == [(8, 12), (4, 6), (2, 3)]
