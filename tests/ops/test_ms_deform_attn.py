"""The deformable-attention operator against literal loops, official numbers and its contract."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import ms_deform_attn_loop
from torch.autograd import gradcheck

from dino_d2.ops import ms_deform_attn as ms_deform_attn_op
from dino_d2.ops.ms_deform_attn import (
    ms_deform_attn,
    ms_deform_attn_backward_pytorch,
    ms_deform_attn_pytorch,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dino" / "ms_deform_attn" / "out.npz")
GOLDEN_CASES = sorted({name.split(".")[0] for name in GOLDEN.files})
SHAPES = [(5, 8), (3, 2), (1, 4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
BACKENDS = ["operator", "pytorch"]  # what the dispatcher chooses for the device, and the twin
TOLERANCE = {  # of the results relative to their largest value
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def make_inputs(shapes=SHAPES, batch=2, heads=3, channels=8, queries=6, points=4, dtype=None):
    """Random arguments in float64 (or `dtype`), a third of the samples outside the maps."""
    generator = torch.Generator().manual_seed(channels + 100 * queries)
    tokens = sum(h * w for h, w in shapes)
    size = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(*size, 2, generator=generator, dtype=torch.float64) * 1.5 - 0.25
    weights = torch.rand(size, generator=generator, dtype=torch.float64)
    gradient = torch.randn(
        batch, queries, heads * channels, generator=generator, dtype=torch.float64
    )
    if dtype is not None and dtype != torch.float64:
        value, weights, gradient = value.to(dtype), weights.to(dtype), gradient.to(dtype)
        locations = locations.float()
    return value, shapes, locations, weights, gradient


def run(backend, value, shapes, locations, weights, gradient):
    """(output, grad_value, grad_locations, grad_weights)"""
    if backend == "pytorch":
        flat = [size for shape in shapes for size in shape]
        output = ms_deform_attn_pytorch(value, flat, locations, weights)
        return output, *ms_deform_attn_backward_pytorch(gradient, value, flat, locations, weights)
    leaves = [t.detach().clone().requires_grad_() for t in (value, locations, weights)]
    output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


def assert_close(actual, expected, tolerance):
    actual = actual.double().cpu().numpy()
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    finite = np.isfinite(expected)
    scale = max(1.0, np.abs(expected[finite]).max(initial=0))
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=0, atol=tolerance * scale)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_official_numbers(case, backend, device):
    data = {n.split(".")[1]: GOLDEN[n] for n in GOLDEN.files if n.startswith(case + ".")}
    shapes = [tuple(shape) for shape in data["spatial_shapes"].tolist()]
    names = ("value", "sampling_locations", "attention_weights", "grad_output")
    value, locations, weights, gradient = (torch.from_numpy(data[n]).to(device) for n in names)
    results = run(backend, value, shapes, locations, weights, gradient)
    # At pixel -1 exactly, the official CUDA kernel and grid_sample differ; ours is the kernel's.
    kernel = "grad_sampling_locations_cuda_semantics"
    grad_locations = data[kernel] if kernel in data else data["grad_sampling_locations"]
    expected = (data["output"], data["grad_value"], grad_locations, data["grad_attention_weights"])
    for actual, wanted in zip(results, expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [1, 4, 6, 16, 30, 32, 71, 152])
def test_equals_a_loop_over_every_sample(channels, dtype, backend, device):
    inputs = make_inputs(channels=channels, dtype=dtype)
    tensors = [t.to(device) if torch.is_tensor(t) else t for t in inputs]
    results = run(backend, *tensors)
    value, shapes, locations, weights, gradient = (
        t.double().numpy() if torch.is_tensor(t) else t for t in inputs
    )
    expected = ms_deform_attn_loop(value, shapes, locations, weights, gradient)
    for actual, wanted in zip(results, expected, strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", [1, 2, 4, 5])
@pytest.mark.parametrize("points", [1, 3, 8, 40])
def test_any_number_of_levels_and_points(levels, points, device):
    shapes = [(8 - level, 2 * level + 1) for level in range(levels)]
    inputs = make_inputs(shapes, batch=1, heads=2, channels=16, queries=3, points=points)
    results = run("operator", *(t.to(device) if torch.is_tensor(t) else t for t in inputs))
    for actual, wanted in zip(results, ms_deform_attn_loop(*inputs), strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_one_query_per_token(device):
    """The encoder's case, in which the CPU kernel visits the queries in tiles."""
    shapes = [(19, 33), (10, 17)]
    tokens = sum(h * w for h, w in shapes)
    inputs = make_inputs(shapes, batch=2, heads=1, channels=4, queries=tokens, points=2)
    results = run("operator", *(t.to(device) if torch.is_tensor(t) else t for t in inputs))
    for actual, wanted in zip(results, ms_deform_attn_loop(*inputs), strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "offset", "expanded", "strided gradient"])
def test_layout_of_memory_does_not_matter(layout, device):
    value, shapes, locations, weights, gradient = make_inputs()
    if layout == "transposed":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
        weights = weights.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
        locations = locations.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "offset":
        value = torch.cat([value, value], 1)[:, : value.shape[1]]
        locations = torch.cat([locations, locations])[: len(locations)]
    elif layout == "expanded":
        value, weights = value[:1].expand_as(value), weights[:1].expand_as(weights)
    else:
        gradient = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    expected = ms_deform_attn_loop(value, shapes, locations, weights, gradient)
    results = run("operator", *(t.to(device) for t in (value,)), shapes, locations.to(device),
                  weights.to(device), gradient.to(device))  # fmt: skip
    for actual, wanted in zip(results, expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_inputs_follow_the_definition(backend, device):
    value, shapes, locations, weights, gradient = make_inputs(points=5, channels=3)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38], dtype=torch.float64)
    locations[0, 0, 0, :, :, 0] = special
    locations[0, 1, 0, :, :, 1] = special
    locations[0, 2, 0, :, :, :] = special[:, None]
    exact = torch.tensor([0.0, 1.0, 0.5 / 8, 7.5 / 8, -0.5 / 8], dtype=torch.float64)
    locations[1, 0, :, 0, :, 0] = exact
    weights[0, 0, 0] = torch.nan  # of samples that take no part
    locations[1, 1:, :, 0, 0] = 0.4  # of samples that take part
    weights[1, 1, 0, 0, 0] = torch.inf
    weights[1, 2, 0, 0, 0] = torch.nan
    value[1, 9, 1], value[1, 10, 2] = torch.inf, torch.nan
    gradient[0, 5, 4] = torch.inf
    expected = ms_deform_attn_loop(value, shapes, locations, weights, gradient)
    assert not any(np.isfinite(e).all() for e in expected), "the case should show propagation"
    assert np.isfinite(expected[0][0, 0, :3]).all(), "and samples that take no part"
    tensors = (t.to(device) if torch.is_tensor(t) else t
               for t in (value, shapes, locations, weights, gradient))  # fmt: skip
    for actual, wanted in zip(run(backend, *tensors), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_border_positions_in_float32(backend):
    """Pixels exactly at -1, 0, the last row or column, and at the size; all representable."""
    shapes = [(4, 8)]
    pixels = torch.tensor([-1.5, -1, -0.5, 0, 1, 3, 3.5, 4, 7, 7.5, 8, 9])
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    locations = torch.stack([(x + 0.5) / 8, (y + 0.5) / 4], -1).reshape(1, -1, 1, 1, 1, 2)
    queries = locations.shape[1]
    value, gradient = torch.randn(1, 32, 1, 5), torch.randn(1, queries, 5)
    weights = torch.rand(1, queries, 1, 1, 1)
    expected = ms_deform_attn_loop(value, shapes, locations, weights, gradient)
    results = run(backend, value, shapes, locations, weights, gradient)
    for actual, wanted in zip(results, expected, strict=True):
        assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_empty_sizes(sizes, backend, device):
    inputs = make_inputs(**sizes)
    results = run(backend, *(t.to(device) if torch.is_tensor(t) else t for t in inputs))
    value, _, locations, weights, gradient = inputs
    expected_shapes = [gradient.shape, value.shape, locations.shape, weights.shape]
    assert [r.shape for r in results] == expected_shapes
    assert all((r == 0).all() for r in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_levels(backend):
    results = run(backend, *make_inputs(shapes=[]))
    assert results[0].shape == (2, 6, 24)
    assert (results[0] == 0).all()


def bad(**changes):
    def change(arguments):
        for name, edit in changes.items():
            arguments[name] = edit(arguments[name])

    return change


# (what is wrong, edit, what the error must name): facts of the operator's contract
BAD_INPUTS = {
    "shapes hold too many tokens": (bad(shapes=lambda s: [(6, 4), (4, 3)]), "spatial_shapes"),
    "shapes hold too few tokens": (
        bad(shapes=lambda s: [(5, 8), (3, 1), (1, 4)]),
        "spatial_shapes",
    ),
    "a level is missing": (bad(shapes=lambda s: s[:2]), "spatial_shapes"),
    "a level too many": (bad(shapes=lambda s: [*s, (1, 1)]), "spatial_shapes"),
    "shapes have three columns": (bad(shapes=lambda s: [(5, 8, 1), (3, 2, 1)]), "spatial_shapes"),
    "shapes are flat": (bad(shapes=lambda s: [5, 8, 3, 2]), "spatial_shapes"),
    "a height is zero": (bad(shapes=lambda s: [(0, 8), (3, 2), (1, 4)]), "spatial_shapes"),
    "a height is negative": (bad(shapes=lambda s: [(-5, -8), (3, 2), (1, 4)]), "spatial_shapes"),
    "a height passes 2**31": (bad(shapes=lambda s: [(2**32 + 5, 8), *s[1:]]), "spatial_shapes"),
    "sizes whose product overflows": (
        bad(shapes=lambda s: [(2**31 - 1, 2**31 - 1)] * 4),
        "spatial_shapes",
    ),
    "shapes are floats": (bad(shapes=lambda s: [(5.0, 8.0), (3.0, 2.0)]), "spatial_shapes"),
    "shapes are a float tensor": (bad(shapes=lambda s: torch.tensor(s).float()), "spatial_shapes"),
    "shapes are a 1-d tensor": (bad(shapes=lambda s: torch.tensor(s).flatten()), "spatial_shapes"),
    "17 levels": (bad(shapes=lambda s: [(1, 1)] * 17, value=lambda v: v[:, :17]), "spatial_shapes"),
    "locations miss a level": (bad(locations=lambda t: t[:, :, :, :2]), "sampling_locations"),
    "locations miss a point": (bad(weights=lambda t: t[..., :3]), "attention_weights"),
    "locations have three columns": (
        bad(locations=lambda t: torch.cat([t, t[..., :1]], -1)),
        "sampling_locations",
    ),
    "locations of another batch": (bad(locations=lambda t: t[:1]), "sampling_locations"),
    "locations of other heads": (bad(locations=lambda t: t[:, :, :2]), "sampling_locations"),
    "locations are 5-d": (bad(locations=lambda t: t[0]), "sampling_locations"),
    "weights miss a head": (bad(weights=lambda t: t[:, :, :2]), "attention_weights"),
    "weights miss a query": (bad(weights=lambda t: t[:, :5]), "attention_weights"),
    "weights are 6-d": (bad(weights=lambda t: t[..., None]), "attention_weights"),
    "value is 3-d": (bad(value=lambda t: t.flatten(2)), "value"),
    "value is integer": (bad(value=lambda t: t.long()), "value"),
    "value is complex": (bad(value=lambda t: t.to(torch.complex64)), "value"),
    "value is a list": (bad(value=lambda t: t.tolist()), "value"),
    "weights of another dtype": (bad(weights=lambda t: t.float()), "attention_weights"),
    "locations are integers": (bad(locations=lambda t: t.long()), "sampling_locations"),
    "float32 locations for float64": (bad(locations=lambda t: t.float()), "sampling_locations"),
    "another device": (bad(weights=lambda t: t.to("meta")), "attention_weights"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named(name):
    change, argument = BAD_INPUTS[name]
    arguments = dict(zip(("value", "shapes", "locations", "weights"), make_inputs(), strict=False))
    change(arguments)
    with pytest.raises(RuntimeError, match=f"ms_deform_attn: {argument}"):
        ms_deform_attn(*arguments.values())


@pytest.mark.compiled
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_cannot_reach_the_kernel(name):
    """A direct call of the registered operator, past the Python checks, is refused as well."""
    change, _ = BAD_INPUTS[name]
    arguments = dict(zip(("value", "shapes", "locations", "weights"), make_inputs(), strict=False))
    change(arguments)
    shapes = arguments["shapes"]
    if torch.is_tensor(shapes):
        pytest.skip("the operator takes a list of integers only")
    flat = [x for shape in shapes for x in (shape if isinstance(shape, tuple) else [shape])]
    if len(flat) != 2 * len(shapes):
        pytest.skip("a flat list has no columns")
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.dino_d2.ms_deform_attn(
            arguments["value"], flat, arguments["locations"], arguments["weights"]
        )


@pytest.mark.compiled
@pytest.mark.parametrize(
    "gradient",
    [torch.zeros(2, 6, 23, dtype=torch.float64), torch.zeros(2, 6, 24)],
    ids=["shape", "dtype"],
)
def test_a_wrong_gradient_is_refused(gradient):
    value, shapes, locations, weights, _ = make_inputs()
    flat = [size for shape in shapes for size in shape]
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.dino_d2.ms_deform_attn_backward(gradient, value, flat, locations, weights)


def test_swapped_height_and_width_is_another_map():
    """Legal, and visible: the same tokens read as maps of other sizes."""
    value, shapes, locations, weights, _ = make_inputs()
    swapped = [(w, h) for h, w in shapes]
    actual = ms_deform_attn(value, swapped, locations, weights)
    assert_close(actual, ms_deform_attn_loop(value, swapped, locations, weights), 1e-12)
    assert not torch.allclose(actual, ms_deform_attn(value, shapes, locations, weights))


def test_spatial_shapes_may_be_a_tensor():
    value, shapes, locations, weights, _ = make_inputs()
    expected = ms_deform_attn(value, shapes, locations, weights)
    for dtype in (torch.int32, torch.int64):
        actual = ms_deform_attn(value, torch.tensor(shapes, dtype=dtype), locations, weights)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_locations_are_widened(dtype):
    value, shapes, locations, weights, _ = make_inputs(dtype=dtype)
    low = locations.to(dtype)
    expected = ms_deform_attn(value, shapes, low.float(), weights)
    assert torch.equal(ms_deform_attn(value, shapes, low, weights), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    value, shapes, locations, weights, _ = make_inputs(channels=5, queries=3)
    leaves = [t.to(device).requires_grad_() for t in (value, locations, weights)]
    # Atomics make the CUDA gradient vary in its last bits.
    tolerance = 1e-12 if device == "cuda" else 0.0
    assert gradcheck(
        lambda value, *rest: ms_deform_attn(value, shapes, *rest), leaves, nondet_tol=tolerance
    )


def test_second_derivative_is_an_error():
    value, shapes, locations, weights, _ = make_inputs()
    value.requires_grad_()
    output = ms_deform_attn(value, shapes, locations, weights.requires_grad_())
    (gradient,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, device):
    value, shapes, locations, weights, gradient = (
        t.to(device) if torch.is_tensor(t) else t for t in make_inputs(dtype=dtype)
    )
    flat = [size for shape in shapes for size in shape]
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    torch.library.opcheck(
        torch.ops.dino_d2.ms_deform_attn.default, (leaves[0], flat, leaves[1], leaves[2])
    )
    arguments = (gradient, value.detach(), flat, locations.detach(), weights.detach())
    torch.library.opcheck(torch.ops.dino_d2.ms_deform_attn_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_forward_and_backward(device):
    value, shapes, locations, weights, gradient = (
        t.to(device) if torch.is_tensor(t) else t for t in make_inputs(dtype=torch.float32)
    )

    def attend(value, locations, weights):
        return ms_deform_attn(value, shapes, locations.clamp(-1, 2), weights.softmax(-1)).relu()

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (value, locations, weights)]
        output = function(*leaves)
        results.append((output, *torch.autograd.grad(output, leaves, gradient)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compile_with_changing_sizes_compiles_once():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def attend(feature_map, locations, weights):
        height, width = feature_map.shape[-2:]
        value = feature_map.flatten(2).transpose(1, 2).unsqueeze(2)
        return ms_deform_attn(value, [(height, width)], locations, weights)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    locations, weights = torch.rand(1, 5, 1, 1, 3, 2), torch.rand(1, 5, 1, 1, 3)
    for size in ((4, 6), (7, 5), (9, 11)):
        feature_map = torch.randn(1, 8, *size)
        expected = attend(feature_map, locations, weights)
        torch.testing.assert_close(compiled(feature_map, locations, weights), expected)
    assert len(graphs) == 1


def test_a_wrong_size_is_named_under_compile():
    value, shapes, locations, weights, _ = make_inputs()
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="attention_weights must have shape"):
        compiled(value, shapes, locations, weights[..., :3])


def test_export():
    class Attend(torch.nn.Module):
        def forward(self, feature_map, locations, weights):
            height, width = feature_map.shape[-2:]
            value = feature_map.flatten(2).transpose(1, 2).unsqueeze(2)
            return ms_deform_attn(value, [(height, width)], locations, weights)

    locations, weights = torch.rand(1, 5, 1, 1, 3, 2), torch.rand(1, 5, 1, 1, 3)
    dynamic = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(
        Attend(),
        (torch.randn(1, 8, 4, 6), locations, weights),
        dynamic_shapes=({**dynamic}, None, None),
    )
    feature_map = torch.randn(1, 8, 9, 5)
    expected = Attend()(feature_map, locations, weights)
    torch.testing.assert_close(program.module()(feature_map, locations, weights), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_locations_in_float32(device):
    value, shapes, locations, weights, _ = (
        t.to(device) if torch.is_tensor(t) else t for t in make_inputs(dtype=torch.float32)
    )
    expected = ms_deform_attn(value.bfloat16(), shapes, locations, weights.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        # softmax returns float32 under autocast on a GPU: mixed inputs are the usual case
        actual = ms_deform_attn(value.bfloat16(), shapes, locations, weights)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.compiled
def test_cpu_results_do_not_depend_on_the_number_of_threads():
    inputs = make_inputs([(16, 16)], queries=256, heads=1, channels=32, dtype=torch.float32)
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
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The suite's core in a process that may use no more than `isa`."""
    tests = Path(__file__)
    selected = "official or loop or border or non_finite or token"
    command = [sys.executable, "-m", "pytest", "-q", str(tests), "-k", selected]
    command += ["-p", "no:cacheprovider", "-W", "ignore"]
    environment = {**os.environ, "DINO_D2_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.compiled
def test_offsets_beyond_32_bits():
    """2**31 channels in all; numpy leaves the zeros untouched, so this needs little memory."""
    heads, channels = 64, 1024
    side = 182  # 182 * 182 * 64 * 1024 > 2**31
    value = torch.from_numpy(np.zeros((1, side * side, heads, channels), np.float32))
    assert value.numel() > 2**31
    value[0, -1, -1] = 7
    locations = torch.full((1, 1, heads, 1, 1, 2), (side - 0.5) / side)
    weights = torch.ones(1, 1, heads, 1, 1)
    output = ms_deform_attn(value, [(side, side)], locations, weights).view(heads, channels)
    assert torch.allclose(output[-1], torch.tensor(7.0), rtol=1e-4)
    assert (output[:-1] == 0).all()


@pytest.mark.cuda
def test_deterministic_mode_is_answered_honestly():
    inputs = [t.cuda() if torch.is_tensor(t) else t for t in make_inputs()]
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="not deterministic"):
            run("operator", *inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_the_cuda_kernels_refuse_deterministic_mode(monkeypatch):
    module = sys.modules["dino_d2.ops.ms_deform_attn"]
    on_cuda, on_cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    refuse = module._refuse_if_not_deterministic
    monkeypatch.setattr(module, "load_native", lambda: SimpleNamespace(cuda=True))
    refuse(on_cuda)  # the mode is off
    try:
        torch.use_deterministic_algorithms(True)
        refuse(on_cpu)
        with pytest.raises(RuntimeError, match="not deterministic"):
            refuse(on_cuda)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="not deterministic"):
            refuse(on_cuda)
        torch.use_deterministic_algorithms(True)
        monkeypatch.setattr(module, "load_native", lambda: SimpleNamespace(cuda=False))
        refuse(on_cuda)  # plain PyTorch, which has deterministic additions
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.cuda
def test_runs_on_the_current_stream():
    inputs = [t.cuda() if torch.is_tensor(t) else t for t in make_inputs()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run("operator", *inputs)
    stream.synchronize()
    expected = ms_deform_attn_loop(*make_inputs())
    for actual, wanted in zip(results, expected, strict=True):
        assert_close(actual, wanted, 1e-12)


def test_the_package_exports_the_function():
    assert ms_deform_attn_op is ms_deform_attn
