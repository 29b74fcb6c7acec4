"""Compiled and recomputed layers: the same gradients, for less memory."""

import copy
import shutil

import pytest
import torch
from tiny import CO_FAMILY, FAMILY, tiny_batch, tiny_detector, tiny_targets
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from dino_d2.models import compile_layers, recompute_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model, width=96):
    """By name, of a batch that the width determines."""
    torch.manual_seed(width)
    images = torch.randn(2, 3, 64, width, dtype=torch.float64)
    mask = torch.zeros(2, 64, width, dtype=torch.bool)
    model.zero_grad()
    sum(model(images, mask, tiny_targets(3, 0)).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model):
    """What the forward pass keeps outside of recomputed layers."""
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, mask = tiny_batch()
    with saved_tensors_hooks(count, lambda tensor: tensor):
        model(images, mask, tiny_targets(3, 0))
    return sum(kept.values())


@pytest.mark.parametrize("name", [*FAMILY, *CO_FAMILY])
def test_recomputed_layers_have_the_same_gradients(name):
    model = tiny_detector(name)
    expected = gradients(copy.deepcopy(model))
    recompute_layers(model)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_recomputed_layers_keep_little():
    """Of a deep model, to which backbone and heads add little."""
    model = tiny_detector("deformable_detr", encoder_layers=8)
    before = kept_bytes(model)
    recompute_layers(model)
    assert kept_bytes(model) < before / 2


def test_recomputed_layers_run_once_without_gradients():
    model = tiny_detector("dino").eval()
    expected = model(*tiny_batch_of_seed())
    recompute_layers(model)
    calls = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        assert torch.equal(model(*tiny_batch_of_seed()).boxes, expected.boxes)
    assert len(calls) == len(model.decoder.layers)


def tiny_batch_of_seed():
    torch.manual_seed(0)
    return tiny_batch()


@pytest.mark.parametrize(("name", "recomputed"), [("dino", True), ("dn_detr", False)])
def test_compiled_layers_have_the_same_gradients(name, recomputed):
    """Without a break, and compiled no more than once for each kind and size from the second on."""
    model = tiny_detector(name)
    widths = (96, 64, 128)
    expected = [gradients(copy.deepcopy(model), width) for width in widths]
    torch.compiler.reset()
    counters.clear()
    compile_layers(model, backend="aot_eager")
    if recomputed:
        recompute_layers(model)
    for width, of_width in zip(widths, expected, strict=True):
        torch.testing.assert_close(gradients(model, width), of_width)
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")
def test_generated_code_has_the_same_gradients():
    """To rounding; written for one size, run for another.

    An absolute part, because the gradients of some biases are 0 but for rounding.
    """
    small = {"in_features": ["coarse"], "num_levels": 1, "encoder_layers": 1, "decoder_layers": 1}
    model = tiny_detector("dino", **small)
    widths = (96, 64)
    expected = [gradients(copy.deepcopy(model), width) for width in widths]
    torch.compiler.reset()
    counters.clear()
    compile_layers(model)
    for width, of_width in zip(widths, expected, strict=True):
        torch.testing.assert_close(gradients(model, width), of_width, rtol=1e-9, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 2  # one for each kind of layer
