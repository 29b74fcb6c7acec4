"""The native sources under sanitizers, the CUDA kernels on the host, and their compilation."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import find_nvcc
from reference import ms_deform_attn_loop

HERE = Path(__file__).parent
OPS = HERE.parents[1] / "ops"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g"]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")


def compile_cpp(sources, output, *options):
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *SANITIZE, *options]
    subprocess.run([*command, *map(str, sources), "-o", str(output)], check=True)


@compiler
def test_ten_thousand_calls_under_sanitizers(tmp_path):
    torch_home = Path(torch.__file__).parent
    library = tmp_path / "sanitized.so"
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
    command = [sys.executable, str(HERE / "sanitized_calls.py"), str(library), "10000"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r"10000 calls, \d{4} refused", result.stdout)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    program = tmp_path_factory.mktemp("emulation") / "kernels"
    # swapcontext counts as setjmp for that warning
    compile_cpp([HERE / "emulation" / "main.cpp"], program, "-Wno-clobbered")

    def run(value, shapes, locations, weights, gradient, seed, blocks):
        batch, tokens, heads, channels = value.shape
        header = [batch, tokens, heads, channels, locations.shape[1], locations.shape[4]]
        header += [len(shapes), value.dtype == np.float64, seed, blocks]
        header += [size for shape in shapes for size in shape]
        arrays = (value, locations, weights, gradient)
        data = np.array(header, np.int64).tobytes() + b"".join(a.tobytes() for a in arrays)
        answer = subprocess.run([program], input=data, capture_output=True)
        assert answer.returncode == 0, answer.stderr.decode()
        results, flat = [], np.frombuffer(answer.stdout, value.dtype)
        for like in (gradient, value, locations, weights):
            results.append(flat[: like.size].reshape(like.shape))
            flat = flat[like.size :]
        return results

    return run


@compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("channels", "points", "queries", "blocks"), [(32, 4, 5, 3), (8, 3, 7, 1), (71, 40, 2, 2)]
)
def test_cuda_kernels_on_the_host(emulated, channels, points, queries, blocks, dtype):
    rng = np.random.default_rng(channels)
    shapes = [(5, 8), (3, 2), (1, 4)]
    value = rng.standard_normal((2, 50, 3, channels)).astype(dtype)
    locations = (rng.random((2, queries, 3, 3, points, 2)) * 2 - 0.5).astype(dtype)
    locations[0, 0, 0, 0, :3] = [[np.nan, 0.5], [np.inf, 0.5], [0.5 / 8, -3e38]]
    locations[1, 0, 0, 0, :2] = [[-0.5 / 8, 0.5], [7.5 / 8, 1.0]]  # exactly at -1 and on a column
    weights = rng.random(locations.shape[:-1]).astype(dtype)
    weights[0, 0, 0, 0, 0] = np.nan  # of a sample that takes no part
    value[1, 4, 1, 0] = np.inf
    gradient = rng.standard_normal((2, queries, 3 * channels)).astype(dtype)
    expected = ms_deform_attn_loop(value, shapes, locations, weights, gradient)
    for seed in (0, 1):
        results = emulated(value, shapes, locations, weights, gradient, seed, blocks)
        tolerance = 1e-11 if dtype == np.float64 else 1e-4
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


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
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(kernels) == 8, "forward and backward in four dtypes"
    assert set(kernels) == {("0", "0")}
