"""Random calls of a sanitized build of the operators; run by test_native_code.py.

Usage: sanitized_calls.py LIBRARY CALLS. Exits with 0 if the sanitizers stay silent, every fourth
legal call equals the PyTorch twin and every illegal one is refused.
"""

import random
import sys
import types
from functools import partial

import torch

torch.ops.load_library(sys.argv[1])
sys.modules["dino_d2._C"] = types.ModuleType("dino_d2._C")  # instead of the installed build

from dino_d2.ops.ms_deform_attn import (  # noqa: E402
    ms_deform_attn_backward_pytorch,
    ms_deform_attn_fused_backward_pytorch,
    ms_deform_attn_fused_pytorch,
    ms_deform_attn_pytorch,
)

FUSED_BACKWARD = partial(ms_deform_attn_fused_backward_pytorch, with_reference=True)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0, 1.0]


def random_call(rng):
    shapes = [rng.randint(1, 6) for _ in range(2 * rng.randint(0, 5))]
    tokens = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
    batch, heads, queries = rng.randint(0, 3), rng.randint(1, 3), rng.choice([0, 1, 3, tokens])
    channels, points = rng.choice([1, 3, 4, 8, 20, 32, 37, 64, 80, 128]), rng.randint(0, 8)
    dtype = rng.choice(DTYPES)
    size = (batch, queries, heads, len(shapes) // 2, points)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    locations = torch.rand(*size, 2, dtype=wide) * 2 - 0.5
    if locations.numel():
        for _ in range(3):
            locations.view(-1)[rng.randrange(locations.numel())] = rng.choice(SPECIAL)
    value = torch.randn(batch, tokens, heads, channels).to(dtype)
    gradient = torch.randn(batch, queries, heads * channels).to(dtype)
    return value, shapes, locations, torch.rand(size).to(dtype), gradient


def make_fused(rng, value, shapes, locations, weights, gradient):
    """The same call in the fused form, with pixels for locations."""
    batch, queries, _, levels, _ = weights.shape
    reference = torch.rand(batch, queries, levels, rng.choice([2, 4]), dtype=locations.dtype)
    offsets = ((locations - 0.5) * 6).to(value.dtype)
    return value, shapes, reference, offsets, weights, gradient


def spoil(rng, value, shapes, locations, weights):
    """A wrong relation between arguments that the kernels would turn into a stray access."""
    kind = rng.randrange(6)
    if kind == 0:
        shapes = [size + 1 for size in shapes] + [3, 3]
    elif kind == 1:
        shapes = [-size for size in shapes] + [0, 5]
    elif kind == 2:
        locations = torch.cat([locations, locations.new_zeros(*locations.shape[:4], 1, 2)], 4)
    elif kind == 3:
        weights = weights[..., :-1] if weights.shape[-1] else weights[..., None]
    elif kind == 4:
        shapes = [*shapes, 2**31 - 1, 2**31 - 1]
    else:
        value = torch.cat([value, value, value.new_zeros(value.shape[0], 1, *value.shape[2:])], 1)
    return value, shapes, locations, weights


def assert_same(actual, expected):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(expected.dtype, 5e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def main(calls: int) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    refused = 0
    for _ in range(calls):
        value, shapes, locations, weights, gradient = random_call(rng)
        if rng.random() < 0.2:
            try:
                torch.ops.dino_d2.ms_deform_attn(*spoil(rng, value, shapes, locations, weights))
                raise SystemExit(f"accepted wrong arguments {shapes} {value.shape}")
            except RuntimeError:
                refused += 1
            continue
        ops, arguments = torch.ops.dino_d2, (value, shapes, locations, weights)
        compares = rng.random() < 0.25  # the twins take most of the time
        if rng.random() < 0.5:
            results = ops.ms_deform_attn(*arguments)
            results = (results, *ops.ms_deform_attn_backward(gradient, *arguments))
            twins = (ms_deform_attn_pytorch, ms_deform_attn_backward_pytorch)
        else:
            *arguments, gradient = make_fused(rng, *arguments, gradient)
            results = ops.ms_deform_attn_fused(*arguments)
            results = (results, *ops.ms_deform_attn_fused_backward(gradient, *arguments, True))
            twins = (ms_deform_attn_fused_pytorch, FUSED_BACKWARD)
        if compares:
            expected = (twins[0](*arguments), *twins[1](gradient, *arguments))
            for a, e in zip(results, expected, strict=True):
                assert_same(a, e)
    print(f"{calls} calls, {refused} refused")


main(int(sys.argv[2]))
