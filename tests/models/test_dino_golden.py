"""DINO against the official implementation at full size, in float64."""

import numpy as np
import pytest
import torch
from golden import (
    assert_gradient_norms,
    assert_losses,
    assert_probe,
    draw,
    make_batch,
    make_noise,
    make_targets,
    official_state,
    pairs_of,
    read_arrays,
    read_json,
    record_matching,
)

from dino_d2.backbones import TorchvisionBackbone
from dino_d2.box_ops import cxcywh_to_xyxy
from dino_d2.checkpoint import convert
from dino_d2.checkpoint.names import official_dino, rename
from dino_d2.losses import pack_targets
from dino_d2.models import build_dino
from dino_d2.postprocess import postprocess
from dino_d2.transformer import ContrastiveDenoising
from dino_d2.transformer.query_selection import propose_anchors

EVAL = "dino/dino_4scale_r50_eval"
LOSS = "dino/dino_4scale_r50_loss"
CDN_LOSS = "dino/dino_4scale_r50_cdn_loss"
CASE = read_json(EVAL)
ARRAYS = read_arrays(EVAL)


@pytest.fixture(scope="module")
def dino():
    backbone = TorchvisionBackbone("resnet50", norm="FrozenBN", freeze_at=2)
    model = build_dino(backbone, ["stride8", "stride16", "stride32"], num_classes=91).double()
    model.load_state_dict(convert(official_state(EVAL), "dino", wanted=model.state_dict()))
    return model


def record(module, store, name, pick=lambda output: output):
    """Append what the module returns to store[name]."""

    def hook(_module, _inputs, output):
        store.setdefault(name, []).append(pick(output))

    return module.register_forward_hook(hook)


@pytest.fixture(scope="module")
def evaluation(dino):
    """Every stage's output for the padded batch."""
    seen = {}
    hooks = [
        record(dino.backbone, seen, "backbone", lambda maps: list(maps.values())),
        record(dino.neck, seen, "pyramid"),
        record(dino.encoder, seen, "memory"),
        record(dino.query_source.norm, seen, "output_memory"),
        record(dino.query_source, seen, "selection"),
        *(
            record(layer, seen, f"encoder.{i}", lambda memory: memory.tokens)
            for i, layer in enumerate(dino.encoder.layers)
        ),
        *(record(layer, seen, f"decoder.{i}.raw") for i, layer in enumerate(dino.decoder.layers)),
        record(dino.encoder.layers[0].attention, seen, "encoder.0.attn_out"),
        record(
            dino.decoder.layers[0].self_attention, seen, "decoder.0.self_attn_out", lambda o: o[0]
        ),
        record(dino.decoder.layers[0].cross_attention, seen, "decoder.0.cross_attn_out"),
    ]
    hooks.append(record(dino.decoder.placement.mlp, seen, "query_pos"))
    hooks.append(record(dino.decoder.norm, seen, "hs"))
    with torch.no_grad():
        images, mask = make_batch(CASE)
        predictions = dino.eval()(images, mask)
    for hook in hooks:
        hook.remove()
    for kind in ("query_pos", "hs"):
        seen.update({f"decoder.{i}.{kind}": [t] for i, t in enumerate(seen.pop(kind))})
    return {
        "input": images,
        "predictions": predictions,
        **{name: output for name, (output,) in seen.items()},
    }


def test_number_of_parameters(dino):
    """The official figure, less the one row of the label embedding that is never used."""
    assert sum(p.numel() for p in dino.parameters()) == 46_893_182 - 256
    trainable = sum(p.numel() for p in dino.parameters() if p.requires_grad)
    assert trainable == 46_670_782 - 256


def test_backbone_and_neck(evaluation):
    assert_probe(ARRAYS, "input", evaluation["input"], 1e-6)
    pyramid = evaluation["pyramid"]
    for level, feature in enumerate(evaluation["backbone"]):
        assert_probe(ARRAYS, f"backbone.{level}", feature, 1e-6)
    for level in range(4):
        assert_probe(ARRAYS, f"src.{level}", pyramid.maps[level], 1e-6)
        assert_probe(ARRAYS, f"pos.{level}", pyramid.positions[level], 1e-6)
        np.testing.assert_array_equal(pyramid.padding_masks[level], ARRAYS[f"mask.{level}"] == 1)


def test_encoder(evaluation):
    memory = evaluation["memory"]
    np.testing.assert_array_equal(np.array(memory.spatial_shapes), ARRAYS["level_shapes"])
    np.testing.assert_allclose(memory.valid_ratios, ARRAYS["valid_ratios"], atol=1e-7)
    assert_probe(ARRAYS, "encoder.0.attn_out", evaluation["encoder.0.attn_out"], 1e-6)
    for layer in range(6):
        assert_probe(ARRAYS, f"encoder.{layer}", evaluation[f"encoder.{layer}"], 1e-6)
    assert_probe(ARRAYS, "memory", memory.tokens, 1e-6)


def test_query_selection(evaluation, dino):
    queries, proposals = evaluation["selection"]
    assert_probe(ARRAYS, "output_memory", evaluation["output_memory"], 1e-6)
    anchors, _ = propose_anchors(evaluation["memory"])
    np.testing.assert_allclose(anchors, ARRAYS["proposals_unsigmoid"], atol=1e-6)
    np.testing.assert_allclose(
        proposals.logits[0, :, :100], ARRAYS["interm_logits_first100"], atol=2e-6
    )
    np.testing.assert_array_equal(proposals.logits[0].argmax(-1), ARRAYS["interm_logits_argmax"])
    scores = proposals.logits[0].amax(-1)
    np.testing.assert_allclose(scores, ARRAYS["enc_topk_score"], atol=2e-6)
    np.testing.assert_allclose(proposals.boxes[0], ARRAYS["interm_boxes"], atol=1e-6)
    chosen = torch.from_numpy(ARRAYS["enc_topk_idx"]).unsqueeze(-1).expand(-1, -1, 4)
    np.testing.assert_allclose(
        anchors.gather(1, chosen).sigmoid(), ARRAYS["interm_boxes_pre"], atol=1e-6
    )
    np.testing.assert_allclose(queries.anchors, ARRAYS["reference.0"], atol=1e-6)


def test_decoder(evaluation):
    for name in ("self_attn_out", "cross_attn_out"):
        assert_probe(ARRAYS, f"decoder.0.{name}", evaluation[f"decoder.0.{name}"], 1e-6)
    for layer in range(6):
        for kind in ("query_pos", "raw", "hs"):
            assert_probe(
                ARRAYS, f"decoder.{layer}.{kind}", evaluation[f"decoder.{layer}.{kind}"], 1e-6
            )
    for layer in range(6):
        for kind, tensor, tolerance in zip(
            ("logits", "boxes"), evaluation["predictions"], (2e-6, 1e-6), strict=True
        ):
            expected = ARRAYS[f"pred_{kind}.{layer}"]
            actual = tensor[layer, :, : expected.shape[1]]
            np.testing.assert_allclose(actual, expected, atol=tolerance)


def test_postprocess(evaluation):
    sizes = torch.tensor([[i["height"], i["width"]] for i in CASE["images"]])
    detections = postprocess(evaluation["predictions"], sizes, 300)
    np.testing.assert_allclose(detections.scores, ARRAYS["post_scores"], atol=1e-6)
    np.testing.assert_array_equal(detections.labels, ARRAYS["post_labels"])
    np.testing.assert_allclose(detections.boxes, ARRAYS["post_boxes"], atol=1e-3)


def assert_gradients(dino, expected, arrays, prefix):
    """Norms, and 16 values of some of the gradients."""
    table = official_dino([])
    assert_gradient_norms(dino, expected["l2"], expected["norm_over_all_trainable"], table)
    parameters = dict(dino.named_parameters())
    for official in expected["l2"]:
        key = f"{prefix}.{official}"
        if key + ".val" in arrays and official != "label_enc.weight":
            values = parameters[rename(official, table)].grad.flatten()[arrays[key + ".idx"]]
            scale = max(np.abs(arrays[key + ".val"]).max(), 1e-12)
            np.testing.assert_allclose(values / scale, arrays[key + ".val"] / scale, atol=1e-6)


@pytest.mark.parametrize("variant", ["objects", "empty0", "all_empty"])
def test_losses_matching_and_gradients(dino, variant, monkeypatch):
    case, arrays = read_json(LOSS), read_arrays(LOSS)
    expected = read_json(LOSS, "losses")[variant]
    monkeypatch.setattr(dino, "denoising", None)
    matched = record_matching(dino, monkeypatch)
    losses = dino.train()(*make_batch(CASE), make_targets(case["variants"][variant]))
    assert_losses(losses, expected["losses"], case["weight_dict"], denoising=False)
    if variant == "all_empty":
        assert all(a.query.numel() == 0 for a in matched.values())
        return
    assert_matching(matched, arrays, variant, case["variants"][variant])
    boxes = [loss for name, loss in losses.items() if "class" not in name]
    for kind, total in (("box", sum(boxes)), ("total", sum(losses.values()))):
        dino.zero_grad()
        total.backward(retain_graph=kind == "box")
        assert_gradients(dino, expected["gradients"][kind], arrays, f"{variant}.grad_{kind}")


def assert_matching(matched, arrays, variant, targets):
    counts = [len(t["labels"]) for t in targets or [{"labels": []}] * 2]
    layers = {f"aux{i}": ("decoder", i) for i in range(5)}
    layers.update({"last": ("decoder", 5), "interm": ("encoder proposals", 0)})
    for official, (group, layer) in layers.items():
        for image in range(2):
            query, target = pairs_of(matched[group], counts, layer, image)
            prefix = f"{variant}.match.{official}.{image}"
            np.testing.assert_array_equal(query, arrays[f"{prefix}.query"])
            np.testing.assert_array_equal(target, arrays[f"{prefix}.target"])


def recorded_noise(arrays, case, counts, repeats):
    """The official draws; labels were drawn for replaced ones only."""
    replaced = arrays[f"{case}.draw_p"] < 0.25
    labels = np.zeros(len(replaced), np.int64)
    labels[replaced] = arrays[f"{case}.draw_new_label"]
    directions = arrays[f"{case}.draw_rand_sign_raw"] * 2 - 1
    amounts = arrays[f"{case}.draw_rand_part_raw"]
    return make_noise(counts, repeats, replaced, labels, directions, amounts)


def test_losses_with_denoising(dino, monkeypatch):
    case, arrays = read_json(CDN_LOSS), read_arrays(CDN_LOSS)
    expected = read_json(CDN_LOSS, "losses")
    draws = read_arrays("dino/cdn")
    counts = [len(t["labels"]) for t in case["targets"]]
    monkeypatch.setattr(
        dino.denoising,
        "draw",
        lambda batch, repeats, *_: recorded_noise(draws, "a", counts, repeats),
    )
    predictions = {}
    hook = record(dino.decoder, predictions, "all")
    losses = dino.train()(*make_batch(CASE), make_targets(case["targets"]))
    hook.remove()
    ((logits, boxes),) = predictions["all"]
    number = case["dn_meta"]["pad_size"]
    pairs = {
        "dn_pred_logits_last": logits[-1, :, :number],
        "pred_logits_last_first100": logits[-1, :, number : number + 100],
        "dn_pred_boxes_last": boxes[-1, :, :number],
        "pred_boxes_last": boxes[-1, :, number:],
        **{f"dn_pred_boxes.{i}": boxes[i, :, :number] for i in range(5)},
    }
    for name, tensor in pairs.items():
        np.testing.assert_allclose(tensor.detach(), arrays[name], atol=2e-6, err_msg=name)
    assert_losses(losses, expected["losses"], case["weight_dict"], denoising=True)
    assert len(losses) == 39
    dino.zero_grad()
    sum(losses.values()).backward()
    assert_gradients(dino, expected["gradients"]["total"], arrays, "grad_total")


@pytest.mark.parametrize("case", read_json("dino/cdn")["cases"], ids=lambda case: case["name"])
def test_contrastive_denoising_queries(case):
    arrays, name, counts = read_arrays("dino/cdn"), case["name"], case["counts"]
    small = case["dn_number"] < 50  # the official meaning of small numbers
    denoising = ContrastiveDenoising(
        num_classes=91,
        embed_dim=256,
        num_queries=None if small else 2 * case["dn_number"],
        num_groups=2 * case["dn_number"] if small else None,
        label_noise=0.25,
        box_noise=1.0,
    ).double()
    embedding = draw("label_enc.weight", (92, 256))
    denoising.label_embed.weight.data = torch.from_numpy(embedding[:91])
    denoising.draw = lambda batch, repeats, *_: recorded_noise(arrays, name, counts, repeats)
    like = torch.zeros((), dtype=torch.float64)
    targets = pack_targets(make_targets(case["targets"]), 91, like)
    noised = denoising(targets)
    anchors = noised.queries.anchors
    assert noised.num_groups == case["dn_meta"]["num_dn_group"]
    assert anchors.shape[1] == case["dn_meta"]["pad_size"]
    if anchors.shape[1]:
        logits = (anchors / (1 - anchors)).log().detach()
        np.testing.assert_allclose(logits, arrays[f"{name}.input_query_bbox"], atol=1e-5)
        assert_probe(arrays, f"{name}.input_query_label", noised.queries.content, 1e-6)
    mask = noised.attn_mask(900)
    expected = np.unpackbits(arrays[f"{name}.attn_mask_packed"])[: mask.numel()]
    np.testing.assert_array_equal(mask.flatten(), expected == 1)


def test_boxes_are_corners():
    box = cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.4]))
    torch.testing.assert_close(box, torch.tensor([0.4, 0.3, 0.6, 0.7]))
