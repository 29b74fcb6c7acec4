"""A small DINO from images to predictions, losses and gradients."""

import pytest
import torch
from tiny import (
    NUM_CLASSES,
    SETTINGS,
    after_neck,
    make_pyramid,
    random_maps,
    tiny_batch,
    tiny_dino,
    tiny_targets,
)

from dino_d2.errors import NonFiniteError, TargetError
from dino_d2.transformer import ContrastiveDenoising, Denoising

pytestmark = pytest.mark.usefixtures("one_thread")

SELECTIONS = ["static", "pure", "mixed"]
SHAPES = ((7, 9), (4, 5), (2, 3))
LARGER = {
    "right": ((7, 16), (4, 8), (2, 4)),
    "below": ((12, 9), (6, 5), (3, 3)),
    "both": ((12, 16), (6, 8), (3, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("padding", LARGER)
def test_predictions_do_not_depend_on_padding(padding, selection):
    model = tiny_dino(query_selection=selection, padding_invariant=True).eval()
    maps, neighbour = random_maps(SHAPES), random_maps(LARGER[padding])
    alone = after_neck(model, make_pyramid([maps]))
    together = after_neck(model, make_pyramid([maps, neighbour]))
    for expected, actual in zip(alone, together, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual.logits[:, :1], expected.logits, rtol=0, atol=1e-9)
            torch.testing.assert_close(actual.boxes[:, :1], expected.boxes, rtol=0, atol=1e-9)


@torch.no_grad()
def test_memory_does_not_depend_on_padding_in_the_published_setting_either():
    model, maps = tiny_dino().eval(), random_maps(SHAPES)
    alone = model.encoder(make_pyramid([maps]))
    together = model.encoder(make_pyramid([maps, random_maps(LARGER["both"])]))
    tokens = together.tokens[0, ~together.padding_mask[0]]
    torch.testing.assert_close(tokens, alone.tokens[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_without_padding_it_does_not_matter():
    published = tiny_dino().eval()
    independent = tiny_dino(padding_invariant=True).eval()
    independent.load_state_dict(published.state_dict())
    batch = tiny_batch()
    assert torch.equal(published(*batch).boxes, independent(*batch).boxes)


@torch.no_grad()
@pytest.mark.parametrize("selection", SELECTIONS)
def test_images_of_equal_size_do_not_influence_each_other(selection):
    model = tiny_dino(query_selection=selection).eval()
    images, mask = tiny_batch(3)
    together = model(images, mask)
    for image in range(3):
        rows = slice(image, image + 1)
        alone = model(images[rows], mask[rows])
        torch.testing.assert_close(together.logits[:, rows], alone.logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(together.boxes[:, rows], alone.boxes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("denoising", ["cdn", "dn", None])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_parameter_is_trained(selection, denoising, twice):
    model = tiny_dino(
        query_selection=selection, denoising=denoising, look_forward_twice=twice, share_heads=False
    ).train()
    sum(model(*tiny_batch(), tiny_targets(3, 1)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("denoising", ["cdn", "dn", None])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_without_objects_every_parameter_has_a_gradient(selection, denoising):
    """Distributed training waits for a gradient of every parameter, be it zero."""
    model = tiny_dino(query_selection=selection, denoising=denoising).train()
    losses = model(*tiny_batch(), tiny_targets(0, 0))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, loss in losses.items():
        assert (loss > 0) == ("class" in name and "dn" not in name), name


@pytest.mark.parametrize("twice", [True, False])
def test_a_box_trains_the_layer_before_if_it_looks_forward_twice(twice):
    model = tiny_dino(look_forward_twice=twice, share_heads=False)
    predictions = model(*tiny_batch())
    weights = [head.layers[-1].weight for head in model.heads.box_heads]
    gradients = torch.autograd.grad(predictions.boxes[2].sum(), weights)
    assert [gradient.any().item() for gradient in gradients] == [False, twice, True]


@pytest.mark.parametrize("denoising", ["cdn", "dn", None])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_names_of_the_losses(num_layers, denoising):
    model = tiny_dino(decoder_layers=num_layers, denoising=denoising).train()
    losses = model(*tiny_batch(), tiny_targets(2, 1))
    layers = ["", *(f"_{layer}" for layer in range(num_layers - 1))]
    suffixes = [*layers, "_enc", *(f"_dn{layer}" for layer in layers if denoising)]
    kinds = ("class", "bbox", "giou")
    assert set(losses) == {f"loss_{kind}{suffix}" for kind in kinds for suffix in suffixes}
    assert all(loss > 0 and loss.shape == () for loss in losses.values())


def test_groups_are_normalized_by_their_number_of_objects():
    """Each of the denoising groups holds all objects once more."""
    model, seen = tiny_dino(denoising_queries=None, denoising_groups=5).train(), {}
    model.criterion = lambda groups: seen.update({g.name: g.normalizer for g in groups}) or {}
    model(*tiny_batch(), tiny_targets(3, 1))
    assert seen == {"": 4, "enc": 4, "dn": 20}


def test_static_queries_have_no_proposals_to_supervise():
    losses = tiny_dino(query_selection="static").train()(*tiny_batch(), tiny_targets(2, 1))
    assert not [name for name in losses if "enc" in name]


@pytest.mark.parametrize("denoising", ["cdn", "dn"])
def test_denoising_is_for_training_only_and_invisible_to_the_other_queries(denoising):
    model, batch, targets = tiny_dino(denoising=denoising), tiny_batch(), tiny_targets(3, 1)
    training, evaluation = model.train()(*batch, targets), model.eval()(*batch, targets)
    assert set(evaluation) == {name for name in training if "dn" not in name}
    assert len(evaluation) < len(training)
    for name, loss in evaluation.items():
        torch.testing.assert_close(training[name], loss, rtol=1e-9, atol=1e-9)


def test_predictions_without_targets_are_the_same_in_training_mode():
    model, batch = tiny_dino(), tiny_batch()
    training, evaluation = model.train()(*batch), model.eval()(*batch)
    assert training.logits.shape == (3, 2, SETTINGS["num_queries"], NUM_CLASSES)
    assert torch.equal(training.logits, evaluation.logits)
    assert torch.equal(training.boxes, evaluation.boxes)


@pytest.mark.parametrize(
    ("choice", "kind"), [("cdn", ContrastiveDenoising), ("dn", Denoising), (None, type(None))]
)
def test_choice_of_denoising(choice, kind):
    assert type(tiny_dino(denoising=choice).denoising) is kind


def test_denoising_takes_a_number_of_groups_or_of_queries():
    denoising = tiny_dino(denoising_queries=None, denoising_groups=3).denoising
    assert (denoising.num_groups, denoising.num_queries) == (3, None)
    denoising = tiny_dino(denoising_queries=None).denoising
    assert (denoising.num_groups, denoising.num_queries) == (None, 200)
    with pytest.raises(ValueError, match="either num_queries or num_groups"):
        tiny_dino(denoising_queries=8, denoising_groups=3)


@pytest.mark.parametrize(("kind", "noise"), [("cdn", (0.25, 1.0)), ("dn", (0.2, 0.4))])
def test_each_denoising_has_its_published_noise(kind, noise):
    denoising = tiny_dino(denoising=kind).denoising
    assert (denoising.label_noise, denoising.box_noise) == noise
    assert tiny_dino(denoising=kind, label_noise=0.0).denoising.label_noise == 0


@pytest.mark.parametrize("setting", ["query_selection", "denoising"])
def test_unknown_choices_are_errors(setting):
    with pytest.raises(ValueError, match=f"{setting} must be in .*, not 'nonsense'"):
        tiny_dino(**{setting: "nonsense"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_reaches_the_forward_pass_and_ends_before_the_losses(dtype):
    model, seen = tiny_dino(torch.float32).train(), {}
    for name in ("encoder.layers.0.ffn.linear1", "decoder.layers.0.cross_attention.value_proj"):
        hook = model.get_submodule(name).register_forward_hook
        hook(lambda _module, _inputs, output, name=name: seen.update({name: output.dtype}))
    images, mask = tiny_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        losses = model(images, mask, tiny_targets(3, 1))
    assert set(seen.values()) == {dtype}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_is_close_to_single(dtype):
    """With one layer: rounding may choose other tokens as queries, but learned ones stay."""
    model = tiny_dino(torch.float32, query_selection="static", decoder_layers=1)
    batch = tiny_batch(dtype=torch.float32)
    expected = model(*batch)
    with torch.autocast("cpu", dtype):
        actual = model(*batch)
    torch.testing.assert_close(actual.boxes.float(), expected.boxes, rtol=0, atol=0.02)


def test_more_objects_than_queries():
    model = tiny_dino(num_queries=4).train()
    with pytest.warns(UserWarning, match="an image has more objects than the 4 queries"):
        losses = model(*tiny_batch(), tiny_targets(9, 1))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_no_queries_are_an_error():
    with pytest.raises(ValueError, match="num_queries must be positive"):
        tiny_dino(num_queries=0).train()(*tiny_batch(), tiny_targets(2, 1))


def test_fewer_tokens_than_queries():
    model = tiny_dino(num_queries=500).train()
    images, mask = tiny_batch()
    num_tokens = 8 * 12 + 4 * 6 + 2 * 3
    assert model(images, mask).boxes.shape[2] == num_tokens
    losses = model(images, mask, tiny_targets(2, 1))
    assert all(loss.isfinite() for loss in losses.values())


def test_an_image_that_is_not_finite_is_named():
    model, (images, mask) = tiny_dino().train(), tiny_batch()
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="decoder layer 0 for image 1") as error:
        model(images, mask, tiny_targets(2, 1))
    assert error.value.image == 1


def test_bad_targets_are_named():
    targets = tiny_targets(2, 1)
    targets[1].labels[0] = NUM_CLASSES
    with pytest.raises(TargetError, match="image 1 of the batch: class id 5 is out of range"):
        tiny_dino().train()(*tiny_batch(), targets)


def test_targets_for_another_number_of_images_are_an_error():
    with pytest.raises(ValueError, match="targets of 3 images for a batch of 2"):
        tiny_dino().train()(*tiny_batch(), tiny_targets(1, 1, 1))
