"""Train a small DINO on generated images, evaluate it and draw its detections.

With Detectron2, training is `train_net.py` with a LazyConfig file and Detectron2's COCOEvaluator.
Without, the same model learns from the same data in plain PyTorch, measured by pycocotools.
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from .. import model_zoo
from ..backbones import TimmBackbone
from ..data.coco import CocoBoxes, Example, evaluate_boxes, to_coco_results
from ..data.shapes import make_shapes
from ..diagnostics.curves import plot_curves
from ..diagnostics.detections import draw_detections
from ..losses import Criterion
from ..models import DETR, build_dino, small
from ..postprocess import postprocess
from ..preprocess import batch_images
from ..types import Target

SIZE = 160
SPLITS = {"train": (1000, 1), "val": (150, 2)}  # images, seed


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dino_d2.tools.demo", description=__doc__)
    parser.add_argument("--out", default="output/demo", help="folder for everything")
    parser.add_argument("--iterations", type=int, default=small.SMALL_ITERATIONS)
    parser.add_argument("--without-detectron2", action="store_true", help="even if it is installed")
    args = parser.parse_args(argv)
    out = Path(args.out)
    start = time.time()
    for split, (images, seed) in SPLITS.items():
        if not (out / split / "annotations.json").exists():
            print(f"Generating {images} images for {split} ...", flush=True)
            make_shapes(out / split, images, SIZE, seed)
    (out / "metrics.json").unlink(missing_ok=True)
    plain = args.without_detectron2 or importlib.util.find_spec("detectron2") is None
    run = train_in_plain_pytorch if plain else train_with_detectron2
    print(f"Training for {args.iterations} iterations "
          f"{'in plain PyTorch' if plain else 'with Detectron2'} ...", flush=True)  # fmt: skip
    results = run(out, args.iterations)
    report(out, results, time.time() - start)


def train_with_detectron2(out: Path, iterations: int) -> Path:
    """Run `train_net.py`; returns the detections of its last evaluation."""
    command = [sys.executable, str(model_zoo.root() / "train_net.py")]
    command += ["--config-file", model_zoo.get_config_file("dino/dino_shapes")]
    command += [f"train.output_dir={out}", f"train.max_iter={iterations}"]
    command += [f"dataloader.evaluator.output_dir={out}/inference"]
    for split, loader in (("train", "train"), ("val", "test")):
        names = f"{out}/{split}/annotations.json:{out}/{split}/images"
        command.append(f"dataloader.{loader}.dataset.names={names}")
    subprocess.run(command, check=True)
    return out / "inference" / "coco_instances_results.json"


def train_in_plain_pytorch(out: Path, iterations: int) -> Path:
    """The same with a loop of our own; returns the detections of its last evaluation."""
    torch.manual_seed(0)
    rng = random.Random(0)
    data, held_out = (CocoBoxes(out / s / "annotations.json", out / s / "images") for s in SPLITS)
    model = build_dino(
        TimmBackbone(**small.SMALL_BACKBONE),
        num_classes=len(data.categories),
        criterion=Criterion(**small.SMALL_CRITERION),
        **small.SMALL_DINO,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=small.SMALL_LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [iterations * 11 // 12])
    start = time.time()
    order: list[int] = []
    for iteration in range(iterations):
        if len(order) < small.SMALL_BATCH:
            order = rng.sample(range(len(data)), len(data))
        batch = [_flip(data[order.pop()], rng) for _ in range(small.SMALL_BATCH)]
        losses = _step(model, optimizer, batch, device)
        schedule.step()
        if (iteration + 1) % 20 == 0:
            _log(out, iteration, losses)
            left = (time.time() - start) / (iteration + 1) * (iterations - iteration - 1)
            total = sum(losses.values())
            print(f"iteration {iteration + 1} of {iterations}, loss {total:.2f}, "
                  f"about {left:.0f} s left", flush=True)  # fmt: skip
        if (iteration + 1) % small.SMALL_EVAL_PERIOD == 0 or iteration + 1 == iterations:
            precision = _evaluate(model, held_out, out, device)
            _log(out, iteration, {f"bbox/{name}": value for name, value in precision.items()})
            print(", ".join(f"{name} {value:.1f}" for name, value in precision.items()), flush=True)
    torch.save({"model": model.state_dict()}, out / "model_final.pth")
    plot_curves(out / "metrics.json", out / "curves.png")
    return out / "results.json"


def _flip(example: Example, rng: random.Random) -> tuple[torch.Tensor, Target]:
    """Mirror left and right at random."""
    if rng.random() < 0.5:
        return example.image, example.target
    boxes = example.target.boxes.clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    return example.image.flip(2), Target(example.target.labels, boxes)


def _step(model: DETR, optimizer, batch, device) -> dict[str, float]:
    images, targets = zip(*batch, strict=True)
    losses = model.train()(*batch_images([i.to(device) for i in images]), targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), small.SMALL_MAX_NORM)
    optimizer.step()
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))


@torch.no_grad()
def _evaluate(model: DETR, data: CocoBoxes, out: Path, device) -> dict[str, float]:
    model.eval()
    results = []
    for index in range(len(data)):
        example = data[index]
        predictions = model(*batch_images([example.image.to(device)]))
        size = torch.tensor([example.image.shape[1:]], device=device)
        detections = postprocess(predictions, size, 100)
        results += to_coco_results(detections, [example.image_id], data.category_ids)
    (out / "results.json").write_text(json.dumps(results))
    return evaluate_boxes(out / "val" / "annotations.json", results)


def _log(out: Path, iteration: int, values: dict[str, float]) -> None:
    """A line of metrics.json, as Detectron2 writes it."""
    if "loss_class" in values:
        values = {**values, "total_loss": sum(values.values())}
    with (out / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": iteration, **values}) + "\n")


def report(out: Path, results: Path, seconds: float) -> None:
    """Draw the pictures and say where they are."""
    annotations = out / "val" / "annotations.json"
    draw_detections(annotations, out / "val" / "images", results, out / "detections.png")
    precision = evaluate_boxes(annotations, json.loads(results.read_text()))
    print(f"""
Done in {seconds:.0f} s. On {SPLITS["val"][0]} held-out images:
{", ".join(f"{name} {value:.1f}" for name, value in precision.items())}

detections beside ground truth:  {out / "detections.png"}
loss and AP over training:       {out / "curves.png"}
weights:                         {out / "model_final.pth"}""")


if __name__ == "__main__":
    main()
