"""Detectron2's heads as co-heads."""

import pytest
import torch

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]

DIM, CLASSES, STRIDES = 16, 3, (8, 16, 32)
SIZES = [(90, 60), (96, 64)]


def make_maps():
    shapes = [(2, DIM, 8 >> i, 12 >> i) for i in range(3)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def make_objects():
    from dino_d2.co_heads import Objects

    boxes = torch.tensor([[5.0, 6, 60, 50], [40, 10, 88, 58]])
    return [Objects(torch.tensor([2, 0]), boxes), Objects(boxes.new_zeros(0).long(), boxes[:0])]


def make_shapes():
    from detectron2.layers import ShapeSpec

    return [ShapeSpec(channels=DIM, stride=stride) for stride in STRIDES]


def retinanet():
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

    sizes = [[4 * stride] for stride in STRIDES]
    return RetinaNet(
        backbone=torch.nn.Identity(),
        head=RetinaNetHead(
            input_shape=make_shapes(), num_classes=CLASSES, num_anchors=3, conv_dims=[DIM]
        ),
        head_in_features=["p3", "p4", "p5"],
        anchor_generator=DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=STRIDES
        ),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=CLASSES,
        pixel_mean=(0.0,),
        pixel_std=(1.0,),
    )


def fcos():
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    backbone = torch.nn.Identity()
    backbone.output_shape = lambda: dict(zip(["p3", "p4", "p5"], make_shapes(), strict=True))
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=make_shapes(), num_classes=CLASSES, conv_dims=[DIM]),
        head_in_features=["p3", "p4", "p5"],
        num_classes=CLASSES,
        pixel_mean=(0.0,),
        pixel_std=(1.0,),
    )


def faster_rcnn():
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
    from detectron2.modeling.roi_heads import (
        FastRCNNConvFCHead,
        FastRCNNOutputLayers,
        StandardROIHeads,
    )

    names = ["p3", "p4", "p5"]
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    rpn = RPN(
        in_features=names,
        head=StandardRPNHead(in_channels=DIM, num_anchors=3),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[32], [64], [96]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=STRIDES
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=32,
        positive_fraction=0.5,
        pre_nms_topk=(50, 50),
        post_nms_topk=(20, 20),
    )
    head = FastRCNNConvFCHead(ShapeSpec(channels=DIM, height=3, width=3), conv_dims=[], fc_dims=[8])
    roi_heads = StandardROIHeads(
        num_classes=CLASSES,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=names,
        box_pooler=ROIPooler(3, [1 / s for s in STRIDES], 0, "ROIAlignV2"),
        box_head=head,
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=8), box2box_transform=transform, num_classes=CLASSES
        ),
    )
    return {"proposal_generator": rpn, "roi_heads": roi_heads, "names": names}


def make_head(name):
    from dino_d2.d2 import DenseCoHead, ROICoHead

    if name == "faster_rcnn":
        return ROICoHead(DIM, CLASSES, STRIDES, **faster_rcnn())
    return DenseCoHead(DIM, CLASSES, STRIDES, {"retinanet": retinanet, "fcos": fcos}[name]())


@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn"])
def test_losses_and_candidates(name):
    from detectron2.utils.events import EventStorage
    from torchvision.ops import box_iou

    head, maps, objects = make_head(name), make_maps(), make_objects()
    with EventStorage():
        losses, candidates = head(maps, SIZES, objects)
    sum(losses.values()).backward()
    assert all(m.grad is not None for m in maps)
    of_image, of_empty = candidates
    assert (of_empty.matched < 0).all()
    positive = of_image.matched >= 0
    assert set(of_image.matched[positive].tolist()) == {0, 1}
    overlap = box_iou(of_image.boxes[positive], objects[0].boxes)
    if name != "fcos":  # whose points have no size worth comparing
        assert overlap.argmax(1).tolist() == of_image.matched[positive].tolist()
    assert of_image.features.shape[1] == DIM
    assert len(of_image.boxes) % len(of_image.features) == 0


@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn"])
def test_detections(name):
    head = make_head(name).eval()
    with torch.no_grad():
        found = head.detect(make_maps(), SIZES)
    assert len(found) == 2
    assert all(d.boxes.shape == (len(d.scores), 4) for d in found)


def test_in_a_detector():
    from detectron2.utils.events import EventStorage
    from tiny import SETTINGS, StubBackbone, tiny_batch, tiny_targets

    from dino_d2.models import build_co_detr, build_dino

    settings = {**SETTINGS, "num_classes": CLASSES, "num_levels": 2, "embed_dim": 32}
    base = build_dino(StubBackbone(), **settings)
    with pytest.raises(ValueError, match="the head has 3 classes, the detector 5"):
        build_co_detr(
            build_dino(StubBackbone(), **SETTINGS), {"detectron2_dense": {"detector": retinanet()}}
        )
    head = retinanet()
    head.head.cls_subnet[0] = torch.nn.Conv2d(32, DIM, 3, padding=1)
    head.head.bbox_subnet[0] = torch.nn.Conv2d(32, DIM, 3, padding=1)
    model = build_co_detr(base, {"detectron2_dense": {"detector": head}})
    targets = [t._replace(labels=t.labels % CLASSES) for t in tiny_targets(2, 1)]
    with EventStorage():
        losses = model.train()(*tiny_batch(dtype=torch.float32), targets)
    assert "loss_cls_detectron2_dense" in losses
    assert "loss_class_detectron2_dense_queries" in losses


def test_from_a_lazy_config():
    """Configs do not build what is inside of `co_heads`; the head does."""
    from detectron2.config import LazyCall as L
    from detectron2.config import instantiate
    from tiny import SETTINGS, StubBackbone

    from dino_d2.models import build_co_detr, build_dino

    settings = {**SETTINGS, "num_classes": CLASSES}
    model = instantiate(
        L(build_co_detr)(
            base=L(build_dino)(backbone=L(StubBackbone)(), **settings),
            co_heads={"detectron2_dense": {"detector": L(retinanet)()}},
        )
    )
    assert type(model.co_heads.heads["detectron2_dense"].detector).__name__ == "RetinaNet"
