"""Time the deformable-attention operator against PyTorch's grid_sample, side by side.

Calls alternate between the implementations and medians are compared, so that a noisy machine
disturbs all of them alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import load_native, ms_deform_attn

BATCH, HEADS, CHANNELS, POINTS = 1, 8, 32, 4
STRIDES = (8, 16, 32, 64)
DECODER_QUERIES = 900
BASELINE = "grid_sample"


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


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple:
    """Arguments of the operator; samples lie a few pixels around their query, as when trained."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(-(-case.height // s), -(-case.width // s)) for s in STRIDES]
    tokens = sum(height * width for height, width in shapes)
    if case.queries is None:
        centres = torch.cat([_centres(*shape) for shape in shapes])
    else:
        centres = torch.rand(case.queries, 2, generator=generator)
    samples = (BATCH, len(centres), HEADS, len(shapes), POINTS)
    offsets = 2 * torch.randn(*samples, 2, generator=generator)
    sizes = torch.tensor([(width, height) for height, width in shapes])
    locations = centres[:, None, None, None] + offsets / sizes[:, None]
    weights = torch.rand(samples, generator=generator).flatten(3).softmax(-1).view(samples)
    value = torch.randn(BATCH, tokens, HEADS, CHANNELS, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return value.to(device, dtype), shapes, locations.to(device, wide), weights.to(device, dtype)


def _centres(height: int, width: int) -> Tensor:
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def forward(function: Callable, inputs: tuple) -> None:
    """Without recording for a gradient."""
    with torch.no_grad():
        function(*inputs)


def forward_and_backward(function: Callable, inputs: tuple) -> None:
    """Gradients of all three tensors."""
    value, shapes, locations, weights = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = function(leaves[0], shapes, *leaves[1:])
    torch.autograd.grad(output, leaves, torch.ones_like(output))


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


def benchmark_op(dtype: torch.dtype, device: str, rounds: int) -> None:
    """Print the table."""
    status = load_native()
    print(f"PyTorch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads")
    print(f"dino_d2: {status.reason}; medians of {rounds} alternating calls\n")
    print(f"{'':18}{'':20}{BASELINE:>14}{'dino_d2':>14}{'ratio':>9}")
    grid_sample_dtype = dtype if torch.device(device).type == "cuda" else torch.float32
    for case in CASES:
        inputs = make_inputs(case, dtype, device)
        value, shapes, locations, weights = inputs
        baseline = (value, shapes, locations, weights)
        if dtype.itemsize < 4:  # grid_sample wants one dtype, and has no half on the CPU
            baseline = tuple(
                x.to(grid_sample_dtype) if isinstance(x, Tensor) else x for x in baseline
            )
        for run in (forward, forward_and_backward):
            jobs = {
                BASELINE: lambda run=run, given=baseline: run(attend_by_grid_sample, given),
                "dino_d2": lambda run=run, given=inputs: run(ms_deform_attn, given),
            }
            median = measure(jobs, rounds, device)
            ratio = median[BASELINE] / median["dino_d2"]
            label = run.__name__.replace("_", " ")
            print(
                f"{case.name:18}{label:>20}{median[BASELINE]:11.2f} ms{median['dino_d2']:11.2f} ms"
                f"{ratio:8.1f}x",
                flush=True,
            )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dino_d2.tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=["op"], help="op: multi-scale deformable attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("float64", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    benchmark_op(getattr(torch, args.dtype), args.device, args.rounds)


if __name__ == "__main__":
    main()
