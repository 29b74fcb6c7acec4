"""What holds for every detector of the family."""

import re

import pytest
import torch
from synchronisations import what_a_step_waits_for
from tiny import (
    FAMILY,
    NUM_CLASSES,
    SETTINGS,
    StubBackbone,
    add_noise,
    after_neck,
    make_pyramid,
    random_maps,
    tiny_batch,
    tiny_detector,
    tiny_targets,
)

from dino_d2.heads import Heads
from dino_d2.losses import pack_targets

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = SETTINGS["decoder_layers"]
DENOISING = [name for name in FAMILY if name.startswith("dn_")]
TWO_STAGE = [name for name in FAMILY if name.endswith("two_stage")]
TWICE = [name for name in FAMILY if re.match("dino|dab_detr|dn_detr", name)]  # looks forward
COUNTS = {"objects": (3, 1), "an image without": (0, 2), "none": (0, 0)}
SMALL_MAPS = ((7, 9), (4, 5), (2, 3))
LARGE_MAPS = ((12, 16), (6, 8), (3, 4))
# zero gradients by definition: keys have one bias, and DAB-DETR's content starts as zero
UNTRAINED = r"key_\w+\.bias$"
OF_NO_CONTENT = r"decoder\.layers\.0\.self_attention\.(query_content|key_content|value)\.weight"
families = pytest.mark.parametrize("name", FAMILY)


def train_losses(model, *counts):
    return model.train()(*tiny_batch(), tiny_targets(*counts))


@families
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_parameter_has_a_gradient(name, counts):
    """Distributed training waits for all of them, be they zero."""
    model = tiny_detector(name)
    sum(train_losses(model, *counts).values()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@families
def test_every_parameter_is_trained(name):
    model = tiny_detector(name)
    sum(train_losses(model, 3, 1).values()).backward()
    untrained = f"{UNTRAINED}|{OF_NO_CONTENT}" if name == "dab_detr" else UNTRAINED
    for parameter_name, parameter in model.named_parameters():
        if not re.search(untrained, parameter_name):
            assert parameter.grad.any(), parameter_name


@families
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_names_of_the_losses(name, counts):
    """Also without objects, when only the classes of ordinary queries have a loss."""
    losses = train_losses(tiny_detector(name), *counts)
    groups = ["", *(["_dn"] if name in (*DENOISING, "dino") else [])]
    layers = ["", *(f"_{layer}" for layer in range(LAYERS - 1))]
    suffixes = [f"{group}{layer}" for group in groups for layer in layers]
    suffixes += ["_enc"] if name in (*TWO_STAGE, "dino") else []
    kinds = ("class", "bbox", "giou")
    assert set(losses) == {f"loss_{kind}{suffix}" for kind in kinds for suffix in suffixes}
    for loss_name, loss in losses.items():
        assert loss.shape == ()
        expected = any(counts) or ("class" in loss_name and "dn" not in loss_name)
        assert (loss > 0) == expected, loss_name


@torch.no_grad()
@families
def test_images_of_equal_size_do_not_influence_each_other(name):
    model, (images, mask) = tiny_detector(name).eval(), tiny_batch(3)
    together = model(images, mask)
    assert together.boxes.shape[:2] == (LAYERS, 3)
    for image in range(3):
        rows = slice(image, image + 1)
        alone = model(images[rows], mask[rows])
        torch.testing.assert_close(together.logits[:, rows], alone.logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(together.boxes[:, rows], alone.boxes, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "dab_detr",
        "dab_deformable_detr",
        "dab_deformable_detr_two_stage",
        "dn_detr_deformable_encoder",
        "deformable_detr",
        "deformable_detr_refine",
    ],
)
def test_predictions_do_not_depend_on_padding(name):
    """For DAB-Deformable-DETR it is a setting."""
    setting = {"padding_invariant": True} if "dab_deformable" in name else {}
    model = tiny_detector(name, **setting).eval()
    levels = len(model.neck.projections)
    maps, larger = (random_maps(shapes[:levels]) for shapes in (SMALL_MAPS, LARGE_MAPS))
    alone, _ = after_neck(model, make_pyramid([maps]))
    together, _ = after_neck(model, make_pyramid([maps, larger]))
    torch.testing.assert_close(together.logits[:, :1], alone.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(together.boxes[:, :1], alone.boxes, rtol=0, atol=1e-9)


@families
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_training_step_waits_once(name, counts):
    assert what_a_step_waits_for(tiny_detector(name).train(), *counts) == ["cpu"]


@families
def test_mixed_precision_has_finite_losses_in_single(name):
    model = tiny_detector(name, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*tiny_batch(dtype=torch.float32), tiny_targets(3, 1))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@families
def test_matching_is_that_of_the_predictions(name):
    model, batch, targets = tiny_detector(name).eval(), tiny_batch(), tiny_targets(3, 1)
    assignment, num_queries = model.match(*batch, targets)
    predictions = model(*batch)
    assert num_queries == 12 * FAMILY[name][1].get("num_patterns", 1)
    assert num_queries == predictions.boxes.shape[2]
    packed = pack_targets(targets, NUM_CLASSES, predictions.boxes)
    expected = model.matcher({"all": (predictions, packed)})["all"]
    assert all(map(torch.equal, assignment, expected))


@pytest.mark.parametrize("name", DENOISING)
def test_denoising_can_be_switched_off(name):
    """Ordinary queries do not notice: losses are the same without it, and in evaluation."""
    batch, targets = tiny_batch(), tiny_targets(3, 1)
    model, without = tiny_detector(name), tiny_detector(name, denoising_groups=0)
    assert without.denoising is None
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("denoising.")}
    without.load_state_dict(weights)
    losses = without.train()(*batch, targets)
    assert not [n for n in losses if "dn" in n]
    assert losses == without.eval()(*batch, targets) == model.eval()(*batch, targets)
    training = model.train()(*batch, targets)
    assert len(training) == 2 * len(losses)
    for n, loss in losses.items():
        torch.testing.assert_close(training[n], loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hide_empty", [True, False])
@pytest.mark.parametrize("name", DENOISING)
def test_hidden_empty_slots_make_denoising_independent_of_the_batch(name, hide_empty):
    """Image 0 has one object; image 1, with three of them, gives it empty slots."""
    settings = {"label_noise": 0, "center_noise": 0, "size_noise": 0, "denoising_groups": 2}
    model = tiny_detector(name, hide_empty=hide_empty, **settings).train()
    seen = []
    model.decoder.register_forward_hook(lambda *call: seen.append(call[-1].boxes[:, 0]))
    (images, mask), targets = tiny_batch(), tiny_targets(1, 3)
    model(images[:1], mask[:1], targets[:1])
    model(images, mask, targets)
    alone, together = seen[0][:, :2], seen[1][:, [0, 3]]
    assert torch.allclose(alone, together, rtol=0, atol=1e-9) == hide_empty


@pytest.mark.parametrize("name", ["dino", *DENOISING])
def test_groups_that_are_supervised(name):
    """Denoising groups hold all objects once more; DN-DETR's empty slots have no loss."""
    one_number = {"denoising_queries": None} if name == "dino" else {}
    model, seen = tiny_detector(name, denoising_groups=5, **one_number), {}
    model.criterion = lambda groups: seen.update({group.name: group for group in groups}) or {}
    train_losses(model, 3, 1)
    assert {n: group.normalizer for n, group in seen.items()} == {
        **{"": 4, "dn": 20},
        **({"enc": 4} if name == "dino" else {}),
    }
    assert seen[""].ignored is None
    assert (seen["dn"].ignored is None) == (name == "dino")
    if name != "dino":
        assert seen["dn"].ignored.sum(1).tolist() == [0, 10]


@pytest.mark.parametrize("name", ["dino", *TWO_STAGE])
def test_classes_of_proposals(name):
    """Those of two-stage Deformable DETR only tell objects from background."""
    model, batch = tiny_detector(name).eval(), tiny_batch()
    targets = tiny_targets(3, 1)
    others = [t._replace(labels=(t.labels + 1) % NUM_CLASSES) for t in targets]
    before, after = model(*batch, targets), model(*batch, others)
    assert before["loss_class"] != after["loss_class"]
    is_agnostic = name == "deformable_detr_two_stage"
    assert (before["loss_class_enc"] == after["loss_class_enc"]) == is_agnostic
    if is_agnostic:
        objects = [t._replace(labels=torch.zeros_like(t.labels)) for t in targets]
        assert before["loss_class_enc"] == model(*batch, objects)["loss_class_enc"]


def anchors_of_layers(model):
    """The references that every layer starts from, and the predictions."""
    seen = []
    model.decoder.placement.register_forward_pre_hook(lambda _, args: seen.append(args[2].anchors))
    predictions = model(*tiny_batch())
    return seen, predictions


@torch.no_grad()
def test_without_box_refinement_all_layers_start_from_the_same_points():
    anchors, _ = anchors_of_layers(tiny_detector("deformable_detr"))
    assert len(anchors) == LAYERS
    assert all(anchors[0] is later for later in anchors)
    assert anchors[0].shape == (2, 12, 2)


@pytest.mark.parametrize("name", sorted({*FAMILY} - {*TWICE, "deformable_detr"}))
def test_with_box_refinement_a_layer_starts_from_the_boxes_before(name):
    anchors, predictions = anchors_of_layers(tiny_detector(name))
    for layer in range(1, LAYERS):
        assert torch.equal(anchors[layer], predictions.boxes[layer - 1])
        assert not anchors[layer].requires_grad


@families
def test_a_box_trains_the_layer_before_if_it_looks_forward_twice(name):
    model = tiny_detector(name)
    model.heads = add_noise(Heads(32, NUM_CLASSES, LAYERS, shared=False).double())
    boxes = model(*tiny_batch()).boxes
    weights = [head.layers[-1].weight for head in model.heads.box_heads]
    gradients = torch.autograd.grad(boxes[2].sum(), weights, materialize_grads=True)
    assert [gradient.any().item() for gradient in gradients] == [False, name in TWICE, True]


@pytest.mark.parametrize(("name", "contents"), [("dn_detr", 1), ("dn_deformable_detr", 12)])
def test_dn_detr_tells_its_queries_from_denoising_ones(name, contents):
    model = tiny_detector(name)
    assert model.query_source.content.shape == (contents, 31)
    assert model.denoising.label_embed.weight.shape == (NUM_CLASSES, 31)


def test_settings_of_denoising():
    settings = {"denoising_groups": 3, "label_noise": 0.1, "center_noise": 0, "size_noise": 0.3}
    denoising = tiny_detector("dn_detr", **settings).denoising
    assert (denoising.num_groups, denoising.num_queries) == (3, None)
    assert (denoising.label_noise, denoising.box_noise) == (0.1, (0, 0.3))
    assert denoising.indicator


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size"),
    [("dn_deformable_detr", -2), ("deformable_detr", -2), ("deformable_detr_two_stage", 0)],
)
def test_sizes_at_the_start(name, size):
    """The first layer makes boxes of a tenth of the image out of points."""
    build, settings = FAMILY[name]
    heads = build(StubBackbone(), **{**SETTINGS, **settings}).heads.box_heads
    assert heads[0].layers[-1].bias.tolist() == [0, 0, size, size]
    assert all(not head.layers[-1].bias.any() for head in heads[1:])


@pytest.mark.parametrize("name", ["dab_detr", "dn_detr", "dn_detr_deformable_encoder"])
def test_temperature_of_the_anchors(name):
    assert tiny_detector(name).decoder.placement.temperature == 10000
    assert tiny_detector(name, anchor_temperature=20).decoder.placement.temperature == 20


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "plain"), [("dn_detr_patterns", False), ("dn_detr_deformable_encoder", True)]
)
def test_weights_at_the_start(name, plain):
    """The official form with a deformable encoder has no special start of its own."""
    build, settings = FAMILY[name]
    model = build(StubBackbone(), **{**SETTINGS, **settings})
    for convolution, *_ in model.neck.projections:
        bound = convolution.weight[0].numel() ** -0.5
        assert 0.9 * bound < convolution.weight.abs().max() <= bound
        assert convolution.bias.any()
    assert model.heads.box_heads[0].layers[-1].weight.any() == plain
    patterns = model.query_source.patterns
    assert (patterns.abs().max() <= (6 / sum(patterns.shape)) ** 0.5) == plain
    if plain:
        for layer in model.encoder.layers:
            assert layer.attention.sampling_offsets.weight.any()
            assert layer.attention.attention_weights.weight.any()
            assert layer.attention.sampling_offsets.bias.abs().max() == SETTINGS["num_points"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deformable_detr", {"two_stage": True}, "two_stage needs box_refinement"),
        ("dab_detr", {"query_content": "nonsense"}, "but is 'nonsense'"),
        ("dab_detr", {"in_features": ["res5"]}, r"no feature maps \['res5'\], only"),
        ("dn_detr", {"activation": "gelu"}, r"activation must be in \[.*\], not 'gelu'"),
    ],
)
def test_wrong_settings_are_errors(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector(name, **settings)
