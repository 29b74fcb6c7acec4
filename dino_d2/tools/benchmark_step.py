"""Time a detector's training step and inference against another's, side by side.

    python -m dino_d2.tools.benchmark_step co_detr/co_dino_r50_5scale_12ep \\
        co_detr/co_dino_r50_5scale_12ep_k0

Steps alternate, and medians are compared. Memory is what the step keeps for its backward pass.
Weights are random; images are noise. Needs Detectron2, whose configs it builds.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .. import model_zoo
from ..types import Target
from .benchmark import measure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.benchmark_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="its name, or a file")
    parser.add_argument("against", help="another")
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--objects", type=int, default=7, help="in the image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    names = [args.config, args.against]
    models = [build(name).to(args.device) for name in names]
    step = partial(train_step, height=args.height, width=args.width, objects=args.objects)
    detect = partial(inference, height=args.height, width=args.width)
    print(f"one image of {args.height}x{args.width} with {args.objects} objects, {args.device}")
    for what, job in (("training step", step), ("inference", detect)):
        jobs = {name: partial(job, model) for name, model in zip(names, models, strict=True)}
        report(what, measure(jobs, args.rounds, args.device), 1, "ms")
    kept = {name: kept_bytes(partial(step, m)) for name, m in zip(names, models, strict=True)}
    report("kept for the backward pass", kept, 2**-20, "MiB")


def build(name: str) -> nn.Module:
    """The detector of a config, with random weights."""
    cfg = model_zoo.get_config(name)
    from detectron2.config import instantiate  # after get_config has said what is missing

    torch.manual_seed(0)
    return instantiate(cfg.model.detector)


def make_images(model: nn.Module, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of noise without padding, and its mask."""
    device = next(model.parameters()).device
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return images.to(device), torch.zeros(1, height, width, dtype=torch.bool, device=device)


def train_step(model: nn.Module, height: int, width: int, objects: int) -> None:
    """Forward and backward."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(objects, 4, generator=generator) * 0.3 + 0.2
    labels = torch.randint(model.num_classes, (objects,), generator=generator)
    losses = model.train()(*make_images(model, height, width), [Target(labels, boxes)])
    model.zero_grad()
    sum(losses.values()).backward()


@torch.no_grad()
def inference(model: nn.Module, height: int, width: int) -> None:
    """Forward, in evaluation mode."""
    model.eval()(*make_images(model, height, width))


def kept_bytes(job: Callable[[], None]) -> int:
    """Bytes of all tensors that autograd saves while the job runs, each storage counted once."""
    sizes = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        job()
    return sum(sizes.values())


def report(what: str, values: dict[str, float], factor: float, unit: str) -> None:
    """A line with both values, and the ratio of the first to the second."""
    first, second = values.values()
    listed = ", ".join(f"{name} {value * factor:.0f} {unit}" for name, value in values.items())
    print(f"{what}: {listed}; ratio {first / second:.2f}")


if __name__ == "__main__":
    main()
