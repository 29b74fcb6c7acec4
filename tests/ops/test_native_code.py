"""The native sources under sanitizers, the CUDA kernels on the host, and their compilation."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import FULL, report
from machine import find_nvcc
from reference import ms_deform_attn_fused_loop, ms_deform_attn_loop

HERE = Path(__file__).parent
OPS = HERE.parents[1] / "ops"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g"]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")


def compile_cpp(sources, output, *options):
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *SANITIZE, *options]
    subprocess.run([*command, *map(str, sources), "-o", str(output)], check=True)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The operators' library with sanitizers, and the environment in which Python can load it."""
    torch_home = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("sanitized") / "operators.so"
    compile_cpp(
        sorted((OPS / "ms_deform_attn").rglob("*.cpp")),
        library,
        *("-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *("-isystem", str(torch_home / "include"), f"-L{torch_home / 'lib'}"),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    )
    # Without libstdc++ beside it, the sanitizer aborts at the first C++ exception.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(r.stdout.strip() for r in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    return library, environment


@compiler
@pytest.mark.faults
@pytest.mark.parametrize(("isa", "calls"), [("baseline", 2000), ("avx2", 4000), ("avx512", 4000)])
def test_ten_thousand_calls_under_sanitizers(sanitized, isa, calls):
    """A hundred thousand in `make test-faults`."""
    calls *= 10 if FULL else 1
    library, environment = sanitized
    command = [sys.executable, str(HERE / "sanitized_calls.py"), str(library), str(calls)]
    environment = {**environment, "DINO_D2_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    refused = re.match(rf"{calls} calls, (\d{{3,}}) refused", result.stdout)
    report(f"sanitizers' errors in {calls} calls ({isa}), {refused[1]} of them wrong", 0)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulation") / "kernels"
    # swapcontext counts as setjmp for that warning
    compile_cpp([HERE / "emulation" / "main.cpp"], program, "-Wno-clobbered")

    def run(kernel, form, arrays, shapes, seed=0, grid_rows=6, aggregates=0):
        """Output and gradients, and how often the backward called atomicAdd."""
        value, reference, offsets, logits, gradient = arrays
        header = [*value.shape, offsets.shape[1], offsets.shape[4], len(shapes), form]
        header += [*kernel, seed, grid_rows, aggregates]
        header += [size for shape in shapes for size in shape]
        data = np.array(header, np.int64).tobytes() + b"".join(a.tobytes() for a in arrays)
        answer = subprocess.run([program], input=data, capture_output=True)
        assert answer.returncode == 0, answer.stderr.decode()
        results, flat = [], np.frombuffer(answer.stdout[:-8], value.dtype)
        for like in (gradient, value, reference, offsets, logits):
            results.append(flat[: like.size].reshape(like.shape))
            flat = flat[like.size :]
        return results, int.from_bytes(answer.stdout[-8:], "little")

    return run


FORMS = {"locations": 0, "points": 1, "boxes": 2}
FLOAT, DOUBLE, BFLOAT16, BFLOAT16_AND_FLOAT = range(4)  # stored types, as in emulation/main.cpp
KERNELS = {  # stored type, lanes, vector: what may run them
    "float": (FLOAT, 8, 4),
    "float, few channels": (FLOAT, 4, 4),
    "float, odd channels": (FLOAT, 8, 1),
    "double": (DOUBLE, 8, 1),
    "bfloat16": (BFLOAT16, 4, 8),
    "bfloat16, many channels": (BFLOAT16, 8, 8),
    "bfloat16, odd channels": (BFLOAT16, 8, 1),
}
CASES = {  # points, queries (None: every token, in tiles of the maps), batch, heads, maps
    "locations": (7, 6, 3, 2, [(1, 9), (4, 4)]),
    "points": (1, None, 2, 3, [(1, 9), (4, 4), (2, 2), (1, 1), (2, 1)]),
    "boxes": (8, None, 2, 2, [(1, 9), (4, 4), (3, 1)]),
}
CHANNELS = {  # of the three cases; of kernels that are not listed, an odd number
    (FLOAT, 8, 4): (24, 48, 64),
    (FLOAT, 4, 4): (4, 16, 8),
    (BFLOAT16, 4, 8): (8, 24, 32),
    (BFLOAT16, 8, 8): (80, 48, 80),
}
# Pixels of the second map, 4 x 4: just outside, on its borders, half on it.
BORDER = np.array([(-1, 1), (1, -1), (4, 1), (1, 4), (0, 0), (3, -0.5)])


def make_cuda_inputs(form, dtype, channels):
    """value, reference, offsets, logits, gradient; a fifth of the samples outside or more."""
    points, queries, batch, heads, shapes = CASES[form]
    rng = np.random.default_rng(channels)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    queries = queries or tokens
    size = (batch, queries, heads, levels, points)
    value = rng.standard_normal((batch, tokens, heads, channels))
    reference = rng.random(
        (batch, queries, levels, {"locations": 0, "points": 2, "boxes": 4}[form])
    )
    offsets, logits = 3 * rng.standard_normal((*size, 2)), rng.standard_normal(size)
    border = BORDER
    if form == "locations":
        offsets, logits = rng.random((*size, 2)) * 2 - 0.5, rng.random(size)
        border = (BORDER + 0.5) / 4
    elif form == "boxes":  # a pixel of the second map is 8 offsets where the box is half of it
        offsets, border = 4 * offsets, 8 * BORDER
        reference[0, :, 1, 2:] = 0.5
    reference[0, :, 1, :2] = 0.5 / 4  # pixel (0, 0)
    offsets[0, : len(border), 1, 1, 0] = border
    offsets[0, :3, 0, 0, 0] = [[np.nan, 0.5], [np.inf, 0.5], [0.5, -3e38]]
    gradient = rng.standard_normal((batch, queries, heads * channels))
    value[1, 4, 1, 0] = np.inf
    return [array.astype(dtype) for array in (value, reference, offsets, logits, gradient)]


def cut_to_bfloat16(array):
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


def loop(form, shapes, value, reference, offsets, logits, gradient):
    if form != "locations":
        return ms_deform_attn_fused_loop(value, shapes, reference, offsets, logits, gradient)
    results = ms_deform_attn_loop(value, shapes, offsets, logits, gradient)
    return results[0], results[1], np.zeros(reference.shape), *results[2:]


@compiler
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", CASES)
def test_cuda_kernels_on_the_host(emulated, kernel, form):
    """With as many queries as tokens in tiles of the maps, which reach over their ends."""
    kernel, shapes = KERNELS[kernel], CASES[form][-1]
    dtype = np.float64 if kernel[0] == DOUBLE else np.float32
    channels = CHANNELS.get(kernel, (19, 19, 19))[FORMS[form]]
    arrays = make_cuda_inputs(form, dtype, channels)
    tolerance = {FLOAT: 1e-4, DOUBLE: 1e-10, BFLOAT16: 3e-2}[kernel[0]]
    if kernel[0] == BFLOAT16:
        kept = 2 if form == "locations" else 1  # what stays in float
        arrays = [a if i == kept else cut_to_bfloat16(a) for i, a in enumerate(arrays)]
        if form == "locations" and kernel[1:] == (4, 8):
            kernel = (BFLOAT16_AND_FLOAT, 4, 8)
        elif form == "locations":
            pytest.skip("its types are those of another case")
    expected = loop(form, shapes, *arrays)
    assert (expected[3] == 0).all(-1).mean() > 0.2, "samples outside, whose gradient is 0"
    # The second grid strides over images and heads. What can be aggregated is, once.
    aggregates = CASES[form][1] is None and kernel[0] != DOUBLE and channels % 4 == 0
    for options in ((0, 6, False), (1, 2, aggregates)):
        results, _ = emulated(kernel, FORMS[form], arrays, shapes, *options)
        for actual, wanted in zip(results, expected, strict=True):
            assert_near(actual, wanted, tolerance)


def assert_near(actual, wanted, tolerance):
    """Up to a part of the largest number."""
    scale = max(1.0, np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * scale)


def make_encoder_inputs(shapes, points, heads, channels, spread):
    """As `make_cuda_inputs`, for queries on maps; most samples near their query, some far away."""
    rng = np.random.default_rng(points)
    centres = [
        [[(x + 0.5) / width, (y + 0.5) / height] for y in range(height) for x in range(width)]
        for height, width in shapes
    ]
    reference = np.concatenate(centres)[None, :, None].repeat(len(shapes), 2)
    tokens = reference.shape[1]
    offsets = spread * rng.standard_cauchy((1, tokens, heads, len(shapes), points, 2))
    offsets[0, 0, 0, 0, 0] = [np.nan, 1e38]
    value = rng.standard_normal((1, tokens, heads, channels))
    logits = rng.standard_normal(offsets.shape[:-1])
    logits[0, 5, 0] = np.nan
    gradient = rng.standard_normal((1, tokens, heads * channels))
    arrays = (value, reference, offsets, logits, gradient)
    return [array.astype(np.float32) for array in arrays]


@compiler
@pytest.mark.parametrize(("points", "channels"), [(3, 36), (5, 8)])
def test_aggregated_gradient_of_value(emulated, points, channels):
    """Windows in the middle and at the borders of maps, wider than the map, and missed."""
    shapes, kernel = [(9, 26), (3, 15), (1, 1)], (FLOAT, 8 if channels > 16 else 4, 4)
    arrays = make_encoder_inputs(shapes, points, 2, channels, spread=2.0)
    direct, additions = emulated(kernel, FORMS["points"], arrays, shapes)
    aggregated, fewer = emulated(kernel, FORMS["points"], arrays, shapes, aggregates=1)
    assert fewer < 0.6 * additions
    assert 0 < np.isnan(direct[1]).mean() < 1
    for actual, wanted in zip(aggregated, direct, strict=True):
        assert_near(actual, wanted, 1e-5)


@compiler
@pytest.mark.parametrize(
    ("far", "rows", "beside"),
    [(3.5, 3, 0), (11.5, 3, 1), (14.5, 2, 2), (39.5, 0, 7)],
    ids=["hit", "straddled", "one of four missed", "missed"],
)
def test_window_of_the_aggregation(emulated, far, rows, beside):
    """Three points lie at pixel 2.5 of a line, one at `far`; the window's 12 rows begin 5 before
    the mean of the first corners. Rows of the window are added to memory once per tile and head,
    those beside it once per query.
    """
    heads, channels, shapes = 2, 8, [(1, 40)]
    locations = np.full((1, 40, heads, 1, 4, 2), 0.5)
    locations[..., 0] = 3 / 40
    locations[..., 3, 0] = (far + 0.5) / 40
    rng = np.random.default_rng(0)
    value, gradient = rng.random((1, 40, heads, channels)), rng.random((1, 40, heads * channels))
    reference, weights = np.zeros((1, 40, 1, 0)), rng.random(locations.shape[:-1])
    arrays = [a.astype(np.float32) for a in (value, reference, locations, weights, gradient)]
    results, additions = emulated((FLOAT, 4, 4), FORMS["locations"], arrays, shapes, aggregates=1)
    assert additions == heads * channels * (40 // 8 * rows + 40 * beside)
    assert_near(results[1], loop("locations", shapes, *arrays)[1], 1e-5)


VALUE_REDUCTIONS = (r"RED\w*\.E\.ADD\.F32x4", r"(?:RED|ATOM)\w*\.E\.ADD\.F32\.")


def find_disassembler():
    """cuobjdump of the toolkit, or the one that comes with Triton."""
    beside = Path(find_nvcc()).with_name("cuobjdump")
    triton = importlib.util.find_spec("triton")
    with_triton = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return next((str(path) for path in (beside, with_triton) if path and path.is_file()), None)


@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_cuda_sources_compile_without_spills(architecture, tmp_path):
    command = [find_nvcc(), "-c", str(OPS / "ms_deform_attn" / "cuda" / "launch.cu")]
    command += ["-o", str(tmp_path / "launch.o"), "-O3", "-std=c++17", "-Xptxas", "-v"]
    command += [
        "-Werror",
        "all-warnings",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert len(stacks) == 37, "16 combinations of types and lanes, 5 of types to aggregate"
    assert set(stacks) == {("0", "0")}
    registers = re.findall(
        r"Function properties for (\S+).*?Used (\d+) registers", result.stderr, re.S
    )
    assert len(registers) == len(stacks)
    for name, count in registers:  # the window of an aggregating warp leaves room for twice as many
        assert int(count) <= (96 if "aggregate" in name else 80)
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("compiled without spills; there is no cuobjdump to look further")
    check_instructions(disassembler, tmp_path / "launch.o", int(architecture))


def check_instructions(disassembler, binary, architecture):
    """Wide loads of value, vector reductions where there are any, and short kernels."""
    listing = subprocess.run([disassembler, "-sass", binary], capture_output=True, text=True).stdout
    kernels, aggregate = {}, []
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", listing, re.S):
        # ...kernelI<types>Li<lanes>ELi<vector>EE...
        kind = re.search(r"(forward|backward)_kernelI(\w+?)Li(\d)ELi(\d)EE", name)
        instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, re.M)
        if kind:
            kernels[kind.groups()] = [text for _, text in instructions]
        else:
            aggregate.append({int(address, 16): text for address, text in instructions})
    assert len(kernels) == 32
    assert len(aggregate) == 5
    for instructions in aggregate:
        check_aggregation(instructions, architecture)
    for (direction, _, _, vector), instructions in kernels.items():
        text = "\n".join(instructions)
        if vector == "1":
            continue
        assert re.search(r"LDG\.E\.128", text), "16 bytes of value per lane"
        assert len(instructions) < 2500
        if direction == "backward":
            vectors, scalars = (len(re.findall(p, text)) for p in VALUE_REDUCTIONS)
            if architecture >= 90:
                assert vectors >= int(vector)  # / 4 per corner
            else:
                assert vectors == 0
                assert scalars >= 4 * int(vector)


def check_aggregation(instructions, architecture):
    """Four points per turn of the inner loop; no atomics in shared memory; vectors to memory."""
    text = "\n".join(instructions.values())
    assert "ATOMS" not in text
    vectors, scalars = (len(re.findall(p, text)) for p in VALUE_REDUCTIONS)
    assert (vectors > 0, scalars > 0) == ((True, False) if architecture >= 90 else (False, True))
    loops = []
    for end, text in instructions.items():
        jump = re.search(r"BRA.*\b0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < end:
            body = [text for at, text in instructions.items() if int(jump[1], 16) <= at <= end]
            loops.append("\n".join(body))
    adding = min((loop for loop in loops if "FFMA" in loop and "STS.128" in loop), key=len)
    assert len(re.findall("FFMA", adding)) == 16
    assert len(re.findall(r"STS\.128", adding)) == 4
    assert adding.count("\n") < 4 * 40  # the reductions beside the window among them
