"""Time the deformable-attention operator against PyTorch's grid_sample, side by side.

Calls alternate between the implementations and medians are compared, so that a noisy machine
disturbs all of them alike.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import load_native, ms_deform_attn, ms_deform_attn_fused

BATCH, HEADS, CHANNELS, POINTS = 1, 8, 32, 4
STRIDES = (8, 16, 32, 64)
DECODER_QUERIES = 900
BASELINE = "grid_sample"
DTYPES = ("float64", "float32", "bfloat16", "float16")
CUDA_BACKWARD = "DINO_D2_CUDA_BACKWARD"  # see ops/README.md


class Case(NamedTuple):
    """A size of DINO's attention with 4 scales."""

    name: str
    height: int  # of the image, in pixels
    width: int
    queries: int | None  # None: every token, as in the encoder


CASES = (
    Case("encoder 800x1333", 800, 1333, None),
    Case("decoder 800x1333", 800, 1333, DECODER_QUERIES),
    Case("encoder 512x512", 512, 512, None),
    Case("decoder 512x512", 512, 512, DECODER_QUERIES),
)


def attend_by_grid_sample(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator by `grid_sample`, one call per level: what runs elsewhere without a kernel.

    Arguments and result as `dino_d2.ops.ms_deform_attn`.
    """
    batch, _, heads, _ = value.shape
    per_head = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)  # (B * H, Q, L, P)
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # (B * H, L, Q, P, 2)
    sizes = [height * width for height, width in spatial_shapes]
    output = 0
    for level, tokens in enumerate(value.split(sizes, 1)):
        maps = tokens.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, spatial_shapes[level])
        samples = functional.grid_sample(maps, grids[:, level], align_corners=False)
        output = output + (samples * per_head[:, None, :, level]).sum(-1)  # (B * H, C, Q)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


class Inputs(NamedTuple):
    """Arguments of the fused operator."""

    value: Tensor  # (B, S, H, C)
    shapes: list[tuple[int, int]]
    reference: Tensor  # (B, Q, L, 2) for the encoder, (B, Q, L, 4) for the decoder
    offsets: Tensor  # (B, Q, H, L, P, 2)
    logits: Tensor  # (B, Q, H, L, P)

    def to(self, device: str, dtype: torch.dtype) -> "Inputs":
        """References stay in float32 at least."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        value, offsets, logits = (
            tensor.to(device, dtype) for tensor in (self.value, self.offsets, self.logits)
        )
        return Inputs(value, self.shapes, self.reference.to(device, wide), offsets, logits)


def make_inputs(case: Case) -> Inputs:
    """Samples lie around their query as when trained: along a direction per head, then spread."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(-(-case.height // s), -(-case.width // s)) for s in STRIDES]
    if case.queries is None:
        reference = torch.cat([_centres(*shape) for shape in shapes])
    else:
        reference = torch.rand(case.queries, 4, generator=generator)
        reference[:, 2:] = 0.02 + 0.3 * reference[:, 2:]
    reference = reference[None, :, None].expand(BATCH, -1, len(shapes), -1).contiguous()
    samples = (BATCH, reference.shape[1], HEADS, len(shapes), POINTS)
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)[:, None, None]
    steps = torch.arange(1, POINTS + 1)[:, None]
    offsets = directions * steps + 2 * torch.randn(*samples, 2, generator=generator)
    logits = torch.randn(samples, generator=generator)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(BATCH, tokens, HEADS, CHANNELS, generator=generator)
    return Inputs(value, shapes, reference, offsets, logits)


def around(attend: Callable, *inputs) -> Tensor:
    """The fused operator by an unfused one: softmax and locations by PyTorch."""
    value, shapes, reference, offsets, logits = Inputs(*inputs)
    places = reference[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    if reference.shape[-1] == 2:
        unit = 1 / places.new_tensor(shapes).flip(-1)[:, None]
    else:
        unit = places[..., 2:] * (0.5 / offsets.shape[4])
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return attend(value, shapes, places[..., :2] + offsets * unit, weights)


def _centres(height: int, width: int) -> Tensor:
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def forward(function: Callable, inputs: Inputs) -> None:
    """Without recording for a gradient."""
    with torch.no_grad():
        function(*inputs)


def forward_and_backward(function: Callable, inputs: Inputs) -> None:
    """Gradients of value, offsets and logits."""
    value, offsets, logits = leaves = [
        tensor.detach().requires_grad_() for tensor in (inputs.value, inputs.offsets, inputs.logits)
    ]
    output = function(value, inputs.shapes, inputs.reference, offsets, logits)
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def directly(job: Callable[[], None]) -> None:
    """With the CUDA backward that does not aggregate the gradient of value on chip."""
    before = os.environ.get(CUDA_BACKWARD)
    os.environ[CUDA_BACKWARD] = "direct"
    try:
        job()
    finally:
        del os.environ[CUDA_BACKWARD]
        if before is not None:
            os.environ[CUDA_BACKWARD] = before


def measure(jobs: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of every job; jobs alternate, one round after the other."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_index in range(rounds + 1):  # the first is for warming up
        for name, job in jobs.items():
            _wait(device)
            start = time.perf_counter()
            job()
            _wait(device)
            if round_index:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(of_job) for name, of_job in times.items()}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def benchmark_op(dtypes: Sequence[torch.dtype], device: str, rounds: int) -> None:
    """Print the table."""
    status = load_native()
    print(f"PyTorch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print(f"dino_d2: {status.reason}; medians of {rounds} alternating calls")
    print("all but fused: with softmax and locations computed by PyTorch\n")
    functions = {
        BASELINE: partial(around, attend_by_grid_sample),
        "unfused": partial(around, ms_deform_attn),
        "fused": ms_deform_attn_fused,
    }
    on_cuda = torch.device(device).type == "cuda"
    columns = [*functions, *(["direct"] if on_cuda else [])]  # "fused" aggregates where it can
    print(f"{'':48}" + "".join(f"{name:>14}" for name in columns) + f"{'ratio':>9}")
    for dtype, case in itertools.product(dtypes, CASES):
        # grid_sample wants one dtype, and has no half on the CPU
        baseline_dtype = torch.float32 if dtype.itemsize < 4 and not on_cuda else dtype
        inputs = make_inputs(case)
        given = {
            name: inputs.to(device, baseline_dtype if name == BASELINE else dtype)
            for name in functions
        }
        for run in (forward, forward_and_backward):
            jobs = {name: partial(run, functions[name], given[name]) for name in functions}
            if on_cuda:
                jobs["direct"] = partial(directly, jobs["fused"])
            median = measure(jobs, rounds, device)
            times = "".join(f"{median[name]:11.2f} ms" for name in columns)
            ratio = median[BASELINE] / median["fused"]
            label = f"{_name(dtype):10}{case.name:18}{run.__name__.replace('_', ' '):>20}"
            print(f"{label}{times}{ratio:8.1f}x", flush=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dino_d2.tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=["op"], help="op: multi-scale deformable attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES[1:]))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    benchmark_op([getattr(torch, name) for name in args.dtypes], args.device, args.rounds)


if __name__ == "__main__":
    main()
