"""The fused operator against literal loops, its unfused sibling and its contract."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import ms_deform_attn_fused_loop
from test_ms_deform_attn import BACKENDS, DEVICES, SHAPES, TOLERANCE, assert_close, bad
from torch.autograd import gradcheck

from dino_d2.ops import ms_deform_attn, ms_deform_attn_fused
from dino_d2.ops.ms_deform_attn import (
    ms_deform_attn_fused_backward_pytorch,
    ms_deform_attn_fused_pytorch,
)

FORMS = pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])


def make_inputs(
    coordinates, shapes=SHAPES, batch=2, heads=3, channels=8, queries=6, points=4, dtype=None
):
    """Random arguments in float64 (or `dtype`), at least a fifth of the samples outside."""
    generator = torch.Generator().manual_seed(channels + 100 * queries + coordinates)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    size = (batch, queries, heads, len(shapes), points)
    value = draw(batch, sum(h * w for h, w in shapes), heads, channels)
    reference = draw(batch, queries, len(shapes), coordinates).sigmoid()
    offsets = (3 if coordinates == 2 else 16) * draw(*size, 2)  # the latter in parts of a box
    logits, gradient = 2 * draw(*size), draw(batch, queries, heads * channels)
    if dtype is not None and dtype != torch.float64:
        value, offsets, logits, gradient = (t.to(dtype) for t in (value, offsets, logits, gradient))
        reference = reference.float()
    return value, shapes, reference, offsets, logits, gradient


def on(device, inputs):
    return [t.to(device) if torch.is_tensor(t) else t for t in inputs]


def flatten(shapes):
    return [size for shape in shapes for size in shape]


def run(backend, value, shapes, reference, offsets, logits, gradient):
    """(output, grad_value, grad_reference, grad_offsets, grad_logits)"""
    tensors = (reference, offsets, logits)
    if backend == "pytorch":
        flat = flatten(shapes)
        output = ms_deform_attn_fused_pytorch(value, flat, *tensors)
        gradients = ms_deform_attn_fused_backward_pytorch(gradient, value, flat, *tensors, True)
        return output, *gradients
    leaves = [t.detach().clone().requires_grad_() for t in (value, *tensors)]
    output = ms_deform_attn_fused(leaves[0], shapes, *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


def expect(inputs):
    return ms_deform_attn_fused_loop(
        *(t.double().numpy() if torch.is_tensor(t) else t for t in inputs)
    )


@FORMS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [1, 24, 32, 48, 64, 71, 80, 128])
def test_equals_a_loop_over_every_sample(channels, dtype, backend, device, coordinates):
    inputs = make_inputs(coordinates, channels=channels, queries=3, dtype=dtype)
    expected = expect(inputs)
    assert (expected[3] == 0).all(-1).mean() > 0.2, "samples outside, whose gradient is 0"
    for actual, wanted in zip(run(backend, *on(device, inputs)), expected, strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


@FORMS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("levels", "points"), [(1, 1), (2, 3), (3, 5), (4, 8), (5, 7)])
def test_any_number_of_levels_and_points(levels, points, dtype, device, coordinates):
    shapes = [(8 - level, 2 * level + 1) for level in range(levels)]
    sizes = {"batch": 3, "heads": 2, "channels": 16, "queries": 3, "points": points}
    inputs = make_inputs(coordinates, shapes, dtype=dtype, **sizes)
    for actual, wanted in zip(run("operator", *on(device, inputs)), expect(inputs), strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


def make_encoder_inputs(dtype, **sizes):
    """A query per token.

    References and offsets are cut to a few bits, so that float32 holds every pixel exactly, and
    none is whole, where derivatives jump: on maps of this size the rounding of pixels would hide
    that of the sums.
    """
    inputs = make_inputs(2, [(19, 23), (10, 11)], dtype=dtype, queries=19 * 23 + 110, **sizes)
    inputs[2].copy_(((inputs[2] * 512).floor() + 0.5) / 512)
    inputs[3].copy_((inputs[3] * 64).round() / 64)
    return inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_query_per_token(dtype, device):
    """The encoder's case, in which kernels work on tiles of queries."""
    inputs = make_encoder_inputs(dtype, batch=2, heads=2, channels=32, points=2)
    for actual, wanted in zip(run("operator", *on(device, inputs)), expect(inputs), strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["direct", "aggregated"])
def test_both_ways_of_the_cuda_backward(way, monkeypatch):
    monkeypatch.setenv("DINO_D2_CUDA_BACKWARD", way)
    inputs = make_encoder_inputs(torch.float32, batch=1, heads=2, channels=36, points=3)
    for actual, wanted in zip(run("operator", *on("cuda", inputs)), expect(inputs), strict=True):
        assert_close(actual, wanted, TOLERANCE[torch.float32])


@pytest.mark.cuda
def test_unknown_way_of_the_cuda_backward_is_an_error(monkeypatch):
    monkeypatch.setenv("DINO_D2_CUDA_BACKWARD", "fast")
    with pytest.raises(RuntimeError, match="must be aggregated or direct, but is fast"):
        run("operator", *on("cuda", make_inputs(2)))


@FORMS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_agrees_with_the_unfused_operator(dtype, device, coordinates):
    inputs = on(device, make_inputs(coordinates, channels=32, dtype=dtype))
    value, shapes, reference, offsets, logits, gradient = inputs
    leaves = [t.clone().requires_grad_() for t in (value, reference, offsets, logits)]
    places = leaves[1][:, :, None, :, None]
    if coordinates == 2:
        unit = 1 / places.new_tensor(shapes).flip(-1)[:, None]
    else:
        unit = places[..., 2:] * (0.5 / offsets.shape[4])
    locations = places[..., :2] + leaves[2] * unit
    weights = leaves[3].flatten(3).softmax(-1).view(logits.shape)
    output = ms_deform_attn(leaves[0], shapes, locations, weights)
    expected = (output.detach(), *torch.autograd.grad(output, leaves, gradient))
    for actual, wanted in zip(run("operator", *inputs), expected, strict=True):
        assert_close(actual, wanted.double().cpu().numpy(), 20 * TOLERANCE[dtype])


@FORMS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_inputs_follow_the_definition(backend, device, coordinates):
    inputs = make_inputs(coordinates, points=5, channels=3, queries=7)
    value, _, reference, offsets, logits, gradient = inputs
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38], dtype=torch.float64)
    offsets[0, 0, 0, :, :, 0] = special
    offsets[0, 1, 0, :, :, 1] = special
    offsets[0, 2] = torch.inf
    reference[0, 3, 0, 0], reference[0, 4, 1, 1] = torch.nan, torch.inf
    if coordinates == 4:
        reference[1, 0, :, 2], reference[1, 1, :, 3] = 0, torch.inf
    logits[1, 2, 0, 0, 0], logits[1, 3, 1, 0, 0] = -torch.inf, torch.nan
    logits[1, 4, 2, 0, 0], logits[1, 5, 0] = torch.inf, -torch.inf
    value[1, 9, 1], value[1, 10, 2], gradient[0, 5, 4] = torch.inf, torch.nan, torch.inf
    expected = expect(inputs)
    assert np.isfinite(expected[0][0, 0, :3]).all(), "samples that take no part do not show"
    assert (expected[0][0, 2] == 0).all(), "nor do they if there are no others"
    for actual, wanted in zip(run(backend, *on(device, inputs)), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_exactly_on_the_border(backend, device):
    """Reference (0.5 / 8, 0.5 / 4) is pixel (0, 0), exactly; offsets lead to -1, 0, and sizes."""
    pixels = torch.tensor([-1.5, -1, -0.5, 0, 1, 3, 3.5, 4, 7, 7.5, 8, 9])
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    offsets = torch.stack([x, y], -1).reshape(1, -1, 1, 1, 1, 2)
    queries = offsets.shape[1]
    reference = torch.tensor([0.5 / 8, 0.5 / 4]).expand(1, queries, 1, 2)
    value, gradient = torch.randn(1, 32, 1, 5), torch.randn(1, queries, 5)
    inputs = (value, [(4, 8)], reference, offsets, torch.randn(1, queries, 1, 1, 1), gradient)
    for actual, wanted in zip(run(backend, *on(device, inputs)), expect(inputs), strict=True):
        assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}, {"shapes": []}]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_empty_sizes(sizes, backend, device):
    inputs = make_inputs(4, **sizes)
    results = run(backend, *on(device, inputs))
    value, _, reference, offsets, logits, gradient = inputs
    wanted = [t.shape for t in (gradient, value, reference, offsets, logits)]
    assert [r.shape for r in results] == wanted
    assert all((r == 0).all() for r in results)


@pytest.mark.parametrize("device", DEVICES)
def test_layout_of_memory_does_not_matter(device):
    inputs = make_inputs(4)
    expected = expect(inputs)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(t) else t
               for t in on(device, inputs)]  # fmt: skip
    for actual, wanted in zip(run("operator", *strided), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


def test_huge_logits_do_not_overflow():
    value, shapes, reference, offsets, logits, _ = make_inputs(2, dtype=torch.float32)
    expected = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    actual = ms_deform_attn_fused(value, shapes, reference, offsets, logits + 2**20)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.5)  # the logits lost bits
    assert actual.isfinite().all()


BAD_INPUTS = {  # (edit, what the error must name)
    "reference misses a level": (bad(reference=lambda t: t[:, :, :2]), "reference"),
    "reference of other queries": (bad(reference=lambda t: t[:, :5]), "reference"),
    "reference has three columns": (bad(reference=lambda t: t[..., :3]), "reference"),
    "reference is 3-d": (bad(reference=lambda t: t[0]), "reference"),
    "reference is float32": (bad(reference=lambda t: t.float()), "reference"),
    "reference on another device": (bad(reference=lambda t: t.to("meta")), "reference"),
    "offsets miss a level": (bad(offsets=lambda t: t[:, :, :, :2]), "sampling_offsets"),
    "offsets are 5-d": (bad(offsets=lambda t: t[0]), "sampling_offsets"),
    "offsets are float32": (bad(offsets=lambda t: t.float()), "sampling_offsets"),
    "logits miss a point": (bad(logits=lambda t: t[..., :3]), "attention_logits"),
    "logits are float32": (bad(logits=lambda t: t.float()), "attention_logits"),
    "value is 3-d": (bad(value=lambda t: t.flatten(2)), "value"),
    "a level is missing": (bad(shapes=lambda s: s[:2]), "spatial_shapes"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("checked", [pytest.param(False, marks=pytest.mark.compiled), True])
def test_bad_input_is_named(checked, name):
    """By Python's checks and, past them, by the registered operator."""
    change, argument = BAD_INPUTS[name]
    names = ("value", "shapes", "reference", "offsets", "logits")
    arguments = dict(zip(names, make_inputs(4)[:5], strict=True))
    change(arguments)
    value, shapes, *tensors = arguments.values()
    if not checked:
        with pytest.raises((RuntimeError, TypeError)):
            torch.ops.dino_d2.ms_deform_attn_fused(value, flatten(shapes), *tensors)
        return
    with pytest.raises(RuntimeError, match=f"ms_deform_attn: {argument}"):
        ms_deform_attn_fused(value, shapes, *tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_references_are_widened(dtype):
    value, shapes, reference, offsets, logits, _ = make_inputs(4, dtype=dtype)
    low = reference.to(dtype)
    expected = ms_deform_attn_fused(value, shapes, low.float(), offsets, logits)
    assert torch.equal(ms_deform_attn_fused(value, shapes, low, offsets, logits), expected)


@FORMS
@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device, coordinates):
    value, shapes, *tensors, _ = on(device, make_inputs(coordinates, channels=5, queries=3))
    leaves = [t.requires_grad_() for t in (value, *tensors)]
    tolerance = 1e-12 if device == "cuda" else 0.0  # atomics vary in the last bits
    assert gradcheck(
        lambda value, *rest: ms_deform_attn_fused(value, shapes, *rest),
        leaves,
        nondet_tol=tolerance,
    )


def test_second_derivative_is_an_error():
    value, shapes, reference, offsets, logits, _ = make_inputs(2)
    output = ms_deform_attn_fused(value.requires_grad_(), shapes, reference, offsets, logits)
    (gradient,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@FORMS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, device, coordinates):
    value, shapes, *tensors, gradient = on(device, make_inputs(coordinates, dtype=dtype))
    leaves = [t.requires_grad_() for t in tensors]
    operator = torch.ops.dino_d2.ms_deform_attn_fused.default
    torch.library.opcheck(operator, (value.requires_grad_(), flatten(shapes), *leaves))
    arguments = (gradient, *(t.detach() for t in (value, *tensors)))
    operator = torch.ops.dino_d2.ms_deform_attn_fused_backward.default
    for with_reference in (True, False):
        torch.library.opcheck(
            operator, (*arguments[:2], flatten(shapes), *arguments[2:], with_reference)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_compile_forward_and_backward(device):
    value, shapes, *tensors, gradient = on(device, make_inputs(4, dtype=torch.float32))

    def attend(value, reference, offsets, logits):
        return ms_deform_attn_fused(value, shapes, reference, offsets * 2, logits + 1).relu()

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (value, *tensors)]
        output = function(*leaves)
        results.append((output, *torch.autograd.grad(output, leaves, gradient)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_export_with_changing_sizes():
    class Attend(torch.nn.Module):
        def forward(self, feature_map, reference, offsets, logits):
            value = feature_map.flatten(2).transpose(1, 2).unsqueeze(2)
            shapes = [tuple(feature_map.shape[-2:])]
            return ms_deform_attn_fused(value, shapes, reference, offsets, logits)

    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 5, 1, 2), (1, 5, 1, 1, 3, 2), (1, 5, 1, 1, 3))
    tensors = [torch.rand(*size, generator=generator) for size in sizes]
    dynamic = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(
        Attend(),
        (torch.randn(1, 8, 4, 6), *tensors),
        dynamic_shapes=({**dynamic}, None, None, None),
    )
    feature_map = torch.randn(1, 8, 9, 5)
    expected = Attend()(feature_map, *tensors)
    torch.testing.assert_close(program.module()(feature_map, *tensors), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_the_reference_in_float32(device):
    value, shapes, reference, *rest, _ = on(device, make_inputs(4, dtype=torch.float32))
    low = [t.bfloat16() for t in (value, *rest)]
    expected = ms_deform_attn_fused(low[0], shapes, reference, *low[1:])
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = ms_deform_attn_fused(low[0], shapes, reference, *rest)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.compiled
@pytest.mark.parametrize("queries", [16 * 16 + 64, 50])
def test_cpu_results_do_not_depend_on_the_number_of_threads(queries):
    shapes = [(16, 16), (8, 8)]
    sizes = {"batch": 1, "heads": 2, "channels": 32, "queries": queries}
    inputs = make_inputs(4, shapes, dtype=torch.float32, **sizes)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run("operator", *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.compiled
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """The core of this file in a process that may use no more than `isa`."""
    selected = "(loop or levels or token or non_finite or border) and operator"
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__)), "-k", selected]
    command += ["-p", "no:cacheprovider", "-W", "ignore"]
    environment = {**os.environ, "DINO_D2_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
