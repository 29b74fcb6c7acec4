"""Co-DETR against the official implementation at full size, in float64."""

import re

import numpy as np
import pytest
import torch
from golden import (
    assert_near,
    make_batch,
    make_noise,
    official_state,
    pairs_of,
    read_arrays,
    read_json,
    record_matching,
)

from dino_d2.backbones import TorchvisionBackbone
from dino_d2.box_ops import xyxy_to_cxcywh
from dino_d2.checkpoint import convert
from dino_d2.checkpoint.names import official_co_detr, rename
from dino_d2.co_heads.collaboration import in_pixels
from dino_d2.losses import pack_targets
from dino_d2.models import build_co_deformable_base, build_co_detr, build_co_dino_base
from dino_d2.postprocess import Suppression, postprocess
from dino_d2.types import Detections, Target

CO_DINO, CO_DEFORMABLE = "co_detr/co_dino_r50_eval", "co_detr/co_deformable_r50_eval"
TRAINING = "co_detr/co_dino_r50_train"
HEADS = ("faster_rcnn", "atss")


def build(case):
    strides = (4, 8, 16, 32) if case == CO_DINO else (8, 16, 32)
    backbone = TorchvisionBackbone("resnet50", strides, norm="FrozenBN", freeze_at=2)
    base = build_co_dino_base if case == CO_DINO else build_co_deformable_base
    model = build_co_detr(base(backbone, list(backbone.output_shape()))).double()
    model.load_state_dict(convert(official_state(case), "co-detr", wanted=model.state_dict()))
    return model


@pytest.fixture(scope="module")
def co_dino():
    return build(CO_DINO)


def batch_of(case):
    in_unit = {key: [value / 255 for value in case[key]] for key in ("mean", "std")}
    return make_batch({**case, **in_unit})


def targets_of(case):
    """From corners in pixels."""
    sizes = [torch.tensor([i["width"], i["height"]] * 2) for i in case["images"]]
    boxes = [torch.tensor(b, dtype=torch.float64).view(-1, 4) for b in case["gt_boxes_xyxy"]]
    return [
        Target(torch.tensor(labels, dtype=torch.int64), xyxy_to_cxcywh(of_image / size))
        for labels, of_image, size in zip(case["gt_labels"], boxes, sizes, strict=True)
    ]


def test_number_of_parameters(co_dino):
    """The official figures; there, batch norm counts even where it is frozen."""
    affine = sum(b.numel() for n, b in co_dino.named_buffers() if n.endswith((".weight", ".bias")))
    assert sum(p.numel() for p in co_dino.parameters()) + affine == 65_204_005
    assert sum(p.numel() for p in co_dino.parameters() if p.requires_grad) == 64_928_485


def check_evaluation(model, name):
    case, arrays = read_json(name), read_arrays(name)
    images, mask = batch_of(case)
    with torch.no_grad():
        seen = {}
        hook = record(model.encoder, seen, "encoder")
        predictions = model.eval()(images, mask)
        hook.remove()
        of_heads = {head: model.co_heads.detect(head, seen["encoder"][1], mask) for head in HEADS}
        unmasked = model(images, torch.zeros_like(mask))
    for layer in range(6):
        stored = "last" if layer == 5 else str(layer)
        for kind in ("logits", "boxes"):
            expected = arrays[f"{kind}.{stored}"]
            assert_near(getattr(predictions, kind)[layer][:, : expected.shape[1]], expected)
    assert_near(unmasked.logits[-1][:, :100], arrays["nomask.logits.last"])
    assert_near(unmasked.boxes[-1][:, :100], arrays["nomask.boxes.last"])
    for head, prefix in zip(HEADS, ("roi", "atss"), strict=True):
        for image, found in enumerate(of_heads[head]):
            assert_detections(found, arrays, f"{prefix}_det", image)
    return predictions, case, arrays


def assert_detections(found, arrays, prefix, image):
    rows = torch.cat([found.boxes, found.scores[:, None]], 1)
    assert_near(rows, arrays[f"{prefix}_boxes.{image}"])
    np.testing.assert_array_equal(found.labels, arrays[f"{prefix}_labels.{image}"])


def sizes_of(case):
    return torch.tensor([[i["height"], i["width"]] for i in case["images"]])


def of_image(detections, image):
    return Detections(*(tensor[image] for tensor in detections))


def test_co_dino_evaluation(co_dino):
    predictions, case, arrays = check_evaluation(co_dino, CO_DINO)
    detections = postprocess(predictions, sizes_of(case), 900, clip=True)
    for threshold, prefix in ((0.8, "det"), (0.3, "softnms03.det")):
        suppress = Suppression("soft_nms", threshold)
        for image in range(2):
            found = suppress(of_image(detections, image))
            assert_detections(Detections(*(t[:300] for t in found)), arrays, prefix, image)


def test_co_deformable_evaluation():
    predictions, case, arrays = check_evaluation(build(CO_DEFORMABLE), CO_DEFORMABLE)
    detections = postprocess(predictions, sizes_of(case), 100, clip=True)
    for image in range(2):
        assert_detections(of_image(detections, image), arrays, "det", image)


@pytest.fixture(scope="module")
def training(co_dino):
    """A training step with the recorded draws: losses, gradients, and what went between."""
    case, arrays, seen = read_json(TRAINING), read_arrays(TRAINING), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", permutation)
        noise = make_noise(
            [len(labels) for labels in case["gt_labels"]],
            2 * case["dn_meta"]["num_dn_group"],
            arrays["dn_draw.label_p"] < 0.25,
            arrays["dn_draw.label_new"],
            2 * arrays["dn_draw.box_sign"] - 1,
            arrays["dn_draw.box_part"],
        )
        patch.setattr(co_dino.denoising, "draw", lambda *_: noise)
        matching = record_matching(co_dino, patch)
        hooks = [record(module, seen, name) for name, module in co_dino.named_modules()]
        losses = co_dino.train()(*batch_of(case), targets_of(case))
        for hook in hooks:
            hook.remove()
        co_dino.zero_grad()
        sum(losses.values()).backward()
    return {"losses": losses, "seen": seen, "matching": matching, "case": case, "arrays": arrays}


def permutation(n, device=None):
    """What the reference has in place of `torch.randperm`."""
    return torch.from_numpy(np.random.default_rng(n).permutation(n))


def record(module, store, name):
    def hook(_module, inputs, output):
        store[name] = inputs, output

    return module.register_forward_hook(hook)


OF_HEADS = {
    "rpn_cls": "rpn_class_faster_rcnn",
    "rpn_bbox": "rpn_bbox_faster_rcnn",
    "cls0": "class_faster_rcnn",
    "bbox0": "giou_faster_rcnn",
    "cls1": "class_atss",
    "bbox1": "giou_atss",
    "centerness1": "centerness_atss",
}


def our_loss_name(official):
    """d2.loss_iou_aux1 -> loss_giou_atss_queries_2"""
    layer, group, kind, head = re.fullmatch(
        r"(?:d(\d)\.)?(enc_|dn_)?loss_(\w+?)(?:_aux(\d))?", official
    ).groups()
    kind = OF_HEADS.get(kind, {"cls": "class", "iou": "giou"}.get(kind, kind))
    group = f"{HEADS[int(head)]}_queries" if head else (group or "").strip("_")
    return "_".join(part for part in ("loss", kind, group, layer) if part)


def test_losses(training):
    official = training["case"]["losses"]
    expected = {
        our_loss_name(name): sum(loss) if isinstance(loss, list) else loss  # one for every level
        for name, loss in official.items()
        if "loss" in name
    }
    losses = {name: loss.item() for name, loss in training["losses"].items()}
    assert losses == pytest.approx(expected, rel=5e-7)
    assert sum(losses.values()) == pytest.approx(training["case"]["total_loss"], rel=1e-7)


def test_gradients(training, co_dino):
    """Most agree to 1e-6. A single positive query of ATSS has another gradient in the reference,
    with the same losses, which shows in what encodes it (7e-4), and a little everywhere upstream.
    """
    case, arrays = training["case"], training["arrays"]
    spec = read_json(TRAINING, "spec")["parameters"]
    table, parameters = official_co_detr(spec), dict(co_dino.named_parameters())
    assert len(case["grad_names"]) == sum(p.requires_grad for p in parameters.values())
    for number, official in enumerate(case["grad_names"]):
        name = re.sub(r"^backbone\.", "backbone.body.", rename(official, table))
        gradient = parameters[name].grad.flatten()
        weights = torch.arange(gradient.numel()) % 7 - 3
        norm = arrays["grad_norm"][number]
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-9), official
        projection = (gradient * weights).sum().item()
        assert projection == pytest.approx(arrays["grad_proj"][number], abs=1e-2 * norm), official


def test_matching(training):
    counts = [3, 5]
    for image in range(2):
        expected = training["arrays"][f"hungarian.{image}"]  # (7, T): of the proposals, then layers
        for row, (group, layer) in enumerate(
            [*(("decoder", layer) for layer in range(6)), ("encoder proposals", 0)]
        ):
            query, target = pairs_of(training["matching"][group], counts, layer, image)
            query = query[target.argsort()]
            assert query.tolist() in expected.tolist(), (group, layer, row)


def test_proposals(training):
    _, proposals = training["seen"]["co_heads.heads.faster_rcnn.proposals"][1]
    for image, boxes in enumerate(proposals):
        assert_near(boxes, training["arrays"][f"rpn.proposals.{image}"][:, :4])


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_head_hands_over(training, number):
    head, arrays = HEADS[number], training["arrays"]
    _, candidates = training["seen"][f"co_heads.heads.{head}"][1]
    case = training["case"]
    packed = pack_targets(targets_of(case), 80, torch.zeros((), dtype=torch.float64))
    objects = in_pixels(packed, [(i["width"], i["height"]) for i in case["images"]])
    for image, of_one in enumerate(candidates):
        if head == "atss":
            positive = (of_one.matched >= 0).nonzero().squeeze(1)
            np.testing.assert_array_equal(positive, arrays[f"atss.pos_index.{image}"])
            assert_near(of_one.boxes[positive], arrays[f"atss.pos_anchors.{image}"])
            boxes = objects[image].boxes[of_one.matched[positive]]
            assert_near(boxes, arrays[f"atss.pos_bbox_targets.{image}"])
        else:
            assert_near(of_one.boxes, arrays["aux.0.all_coords"][image])
            labels = objects[image].labels[of_one.matched].where(of_one.matched >= 0, 80)
            np.testing.assert_array_equal(labels, arrays["aux.0.all_labels"][image])


@pytest.mark.parametrize("number", [0, 1])
def test_positive_queries(training, number):
    _, known = training["seen"][f"co_heads.queries.{HEADS[number]}"]
    check_queries(training, known, f"aux.{number}")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("variant", ["cap12", "zeropad", "cap12zeropad"])
def test_positive_queries_otherwise(training, co_dino, number, variant, monkeypatch):
    monkeypatch.setattr(torch, "randperm", permutation)
    queries = co_dino.co_heads.queries[HEADS[number]]
    inputs, _ = training["seen"][f"co_heads.queries.{HEADS[number]}"]
    if "cap12" in variant:
        monkeypatch.setattr(queries, "most", 12)
    monkeypatch.setattr(queries, "pad_with_negatives", "zeropad" not in variant)
    check_queries(training, queries(*inputs), f"{variant}.aux.{number}")


def check_queries(training, known, prefix):
    arrays = training["arrays"]
    all_labels = np.concatenate(training["case"]["gt_labels"])
    assert_near(known.queries.anchors, arrays[f"{prefix}.coords"])
    labels = torch.full(known.queries.anchors.shape[:2], 80)
    image, (query,), (target,) = known.assignment
    labels[image, query] = torch.from_numpy(all_labels)[target]
    np.testing.assert_array_equal(labels, arrays[f"{prefix}.labels"])
    trained = arrays[f"{prefix}.label_weights"] == 1
    padding = torch.zeros_like(labels, dtype=torch.bool) if known.padding is None else known.padding
    np.testing.assert_array_equal(~padding, trained)


def test_decoder_inputs(training):
    for number, head in enumerate(HEADS):
        _, known = training["seen"][f"co_heads.queries.{head}"]
        arrays = training["arrays"]
        probe = arrays[f"aux.{number}.decoder_query"]
        values = known.queries.content.transpose(0, 1).flatten().detach().numpy()
        count = len(probe) - 2
        chosen = np.arange(count) * len(values) // count
        np.testing.assert_allclose(values[chosen], probe[:-2], atol=2e-6)
        assert_near(known.queries.anchors, arrays[f"aux.{number}.decoder_reference"])
