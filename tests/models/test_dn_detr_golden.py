"""DN-DETR against the official implementation at full size, in float64."""

import numpy as np
import pytest
import torch
from golden import (
    assert_gradient_norms,
    assert_losses,
    assert_near,
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
from dino_d2.checkpoint import convert
from dino_d2.checkpoint.names import official_dab
from dino_d2.losses import pack_targets
from dino_d2.models import build_dn_detr
from dino_d2.postprocess import postprocess
from dino_d2.transformer import Denoising
from dino_d2.types import Predictions

DENSE = "dn_detr/dn_dab_detr_r50_eval"
DEFORMABLE = "dn_detr/dn_dab_deformable_detr_r50_eval"
WITHOUT_DN = "dn_detr/dn_dab_detr_r50_train_nodn"
WITH_DN = "dn_detr/dn_dab_detr_r50_train_dn"
PREPARE = "dn_detr/dn_prepare"
INPUT = read_json(DENSE)["input"]
LABEL_NOISE = 0.2


def load(case, strides, **settings):
    backbone = TorchvisionBackbone("resnet50", strides, norm="FrozenBN", freeze_at=2)
    features = [f"stride{stride}" for stride in strides]
    model = build_dn_detr(backbone, features, num_classes=91, **settings).double()
    model.load_state_dict(convert(official_state(case), "dn-detr", wanted=model.state_dict()))
    return model


@pytest.fixture(scope="module")
def dense():
    return load(DENSE, (32,))


@pytest.fixture(scope="module")
def deformable():
    return load(DEFORMABLE, (8, 16, 32), deformable=True, num_levels=4)


@torch.no_grad()
def evaluate(model, *stages):
    """Predictions for the padded batch, and what each stage returned at each of its calls."""
    seen = []
    for outputs, stage in [([], stage) for stage in stages]:
        seen.append(outputs)
        stage.register_forward_hook(lambda *call, to=outputs: to.append(call[-1]))
    predictions = model.eval()(*make_batch(INPUT))
    for stage in stages:
        stage._forward_hooks.clear()
    return predictions, *seen


def test_dense(dense):
    arrays = read_arrays(DENSE)
    np.testing.assert_array_equal(make_batch(INPUT)[1], arrays["image_mask"])
    predictions, (pyramid,), (memory,), outputs = evaluate(
        dense, dense.neck, dense.encoder, dense.decoder.norm
    )
    np.testing.assert_array_equal(pyramid.padding_masks[0], arrays["feature_mask"])
    assert_near(pyramid.positions[0], arrays["pos_embed"])
    assert_near(memory.tokens.transpose(0, 1), arrays["memory"])
    assert_near(torch.stack(outputs)[:, :, :8], arrays["hs_first8"])
    assert_near(predictions.logits, arrays["layers_pred_logits"])
    assert_near(predictions.boxes, arrays["layers_pred_boxes"])


def test_deformable(deformable):
    arrays = read_arrays(DEFORMABLE)
    predictions, (memory,), *outputs = evaluate(
        deformable, deformable.encoder, *deformable.decoder.layers
    )
    tokens = memory.tokens.masked_fill(memory.padding_mask[..., None], 0)
    assert_near(tokens[..., ::16], arrays["memory_every16"])
    assert_near(torch.stack([output[:, :8] for (output,) in outputs]), arrays["hs_first8"])
    assert_near(predictions.logits[:, :, :100], arrays["layers_pred_logits_first100"])
    assert_near(predictions.boxes[:, :, :100], arrays["layers_pred_boxes_first100"])
    assert_near(predictions.logits[-1], arrays["pred_logits"])
    assert_near(predictions.boxes[-1], arrays["pred_boxes"])


@pytest.mark.parametrize(("model", "case"), [("dense", DENSE), ("deformable", DEFORMABLE)])
def test_number_of_parameters(model, case, request):
    """The official figures, less label embeddings: of the matching part where it has its own."""
    unused = 255 if model == "deformable" else 0
    parameters, given = list(request.getfixturevalue(model).parameters()), read_json(case)
    trainable = [p.numel() for p in parameters if p.requires_grad]
    assert sum(p.numel() for p in parameters) == given["n_parameters"] - unused
    assert sum(trainable) == given["n_parameters_trainable"] - unused


@pytest.mark.parametrize("case", [DENSE, DEFORMABLE])
def test_postprocess(case):
    """Of the stored predictions of the last layer: scores are too close for those of a network."""
    arrays, given = read_arrays(case), read_json(case)["post"]
    arrays = {name.replace("layers_", ""): array for name, array in arrays.items()}
    last = [arrays[name].astype(np.float64) for name in ("pred_logits", "pred_boxes")]
    last = [torch.from_numpy(array[-1] if array.ndim == 4 else array)[None] for array in last]
    sizes = torch.tensor(given["target_sizes_hw"])
    detections = postprocess(Predictions(*last), sizes, given["num_select"])
    for image in range(2):
        assert_near(detections.scores[image], arrays[f"post_image{image}_scores"])
        assert_near(detections.boxes[image], arrays[f"post_image{image}_boxes"])
        labels = arrays[f"post_image{image}_labels"]
        np.testing.assert_array_equal(detections.labels[image], labels)


def assert_matching(assignment, counts, arrays, variant=""):
    for layer, image in np.ndindex(6, 2):
        expected = arrays[f"{variant}match_layer{layer}_image{image}"]
        found = np.array([x.numpy() for x in pairs_of(assignment, counts, layer, image)])
        np.testing.assert_array_equal(found, expected)


def assert_gradients(model, losses, case, arrays, variant=""):
    """The norms were stored in single precision."""
    model.zero_grad()
    sum(losses.values()).backward()
    names = case[f"{variant}grad_norms_all_names"]
    norms = dict(zip(names, arrays[f"{variant}grad_norms_all"].tolist(), strict=True))
    total = case[f"{variant}grad_norm_total"]
    assert_gradient_norms(model, norms, total, official_dab(names), rel=1e-6)


@pytest.mark.parametrize("variant", ["", "empty0/", "allempty/"])
def test_losses_matching_and_gradients(dense, variant, monkeypatch):
    case, arrays = read_json(WITHOUT_DN), read_arrays(WITHOUT_DN)
    targets = {"": "targets", "empty0/": "targets_image0_empty"}.get(variant)
    targets = make_targets(case.get(targets))
    monkeypatch.setattr(dense, "denoising", None)
    matched = record_matching(dense, monkeypatch)
    losses = dense.train()(*make_batch(INPUT), targets)
    official, weights = case[variant + "loss_dict"], case[variant + "weight_dict"]
    assert_losses(losses, official, weights, denoising=False)
    counts = [len(target.labels) for target in targets]
    assert_matching(matched["decoder"], counts, arrays, variant)
    assert_gradients(dense, losses, case, arrays, variant)


def recorded_noise(counts, groups, seed):
    """The official draws. Their noise of boxes has its sign in the amount."""
    rng, number = np.random.default_rng(seed), groups * sum(counts)
    replaced = rng.random(number) < LABEL_NOISE
    labels, amounts = rng.integers(0, 91, number), rng.random((number, 4)) * 2 - 1
    return make_noise(counts, groups, replaced, labels, np.ones((number, 4)), amounts)


def test_losses_with_denoising(dense, monkeypatch):
    case, arrays = read_json(WITH_DN), read_arrays(WITH_DN)
    counts = [len(t["labels"]) for t in case["targets"]]
    noise = recorded_noise(counts, 5, case["draw_seed"])
    monkeypatch.setattr(dense.denoising, "draw", lambda *_: noise)
    matched = record_matching(dense, monkeypatch)
    seen = []
    hook = dense.decoder.register_forward_hook(lambda *call: seen.append(call[-1]))
    losses = dense.train()(*make_batch(INPUT), make_targets(case["targets"]))
    hook.remove()
    (predictions,) = seen
    noised, others = predictions.queries(0, 25), predictions.queries(25)
    assert_near(noised.logits[-1], arrays["dn_pred_logits_last"])
    assert_near(noised.boxes, arrays["dn_pred_boxes_layers"])
    assert_near(others.logits[-1, :, :32], arrays["pred_logits_last_first32"])
    assert_near(others.boxes[-1, :, :32], arrays["pred_boxes_last_first32"])
    assert_matching(matched["decoder"], counts, arrays)
    assert_losses(losses, case["loss_dict"], case["weight_dict"], denoising=True)
    assert_gradients(dense, losses, case, arrays)


@pytest.mark.parametrize("name", list(read_json(PREPARE)["cases"]))
def test_denoising_queries(name, monkeypatch):
    case, arrays = read_json(PREPARE)["cases"][name], read_arrays(PREPARE)
    denoising = Denoising(91, 256, num_groups=5, label_noise=LABEL_NOISE, indicator=True).double()
    denoising.label_embed.weight.data = torch.from_numpy(draw("label_enc.weight", (92, 255)))[:91]
    noise = recorded_noise(case["counts"], 5, case["draw_seed"])
    monkeypatch.setattr(denoising, "draw", lambda *_: noise)
    targets = pack_targets(make_targets(case["targets"]), 91, noise.amount)
    noised = denoising(targets)
    assert_near(noised.queries.content, arrays[f"{name}/input_query_label_dn"])
    anchors = noised.queries.anchors
    assert anchors.shape[1] == case["pad_size"]
    expected = arrays[f"{name}/input_query_bbox"][:, : case["pad_size"]]
    assert_near((anchors / (1 - anchors)).log(), expected)
    np.testing.assert_array_equal(noised.attn_mask(300), arrays[f"{name}/attn_mask"])
    image, (query,), (target,) = noised.assignment
    np.testing.assert_array_equal(image, np.tile(arrays[f"{name}/batch_idx"], 5))
    np.testing.assert_array_equal(query, arrays[f"{name}/map_known_indice"])
    np.testing.assert_array_equal(targets.labels[target], arrays[f"{name}/known_labels"])
    supervised = noised.ignored.logical_not().nonzero()
    assert sorted(supervised.tolist()) == sorted(torch.stack([image, query], 1).tolist())
