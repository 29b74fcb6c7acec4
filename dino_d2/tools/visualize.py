"""Draw what a detector looks at, on a few images (the diagnostics of Co-DETR).

    python -m dino_d2.tools.visualize --config dino/dino_r50_4scale_12ep --weights dino.pth \\
        --data annotations.json:images --num-images 4 --out output/visualize

score_maps.png        where the encoder's features and the decoder's cross-attention are strong
iof_iob.png           which share of objects and of background they take in
query_positions.png   where queries that find an object start from
head_distances.png    how differently the heads look, for detectors with co-heads

Needs Detectron2, whose configs and data loaders it uses.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import model_zoo
from ..box_ops import xyxy_to_cxcywh
from ..checkpoint import CheckpointError, load_weights
from ..diagnostics.discriminability import (
    cross_attention,
    discriminability,
    draw_score_maps,
    foreground_shares,
    level_maps,
    plot_foreground_shares,
)
from ..diagnostics.head_distances import (
    draw_head_distances,
    grad_cam,
    head_conflicts,
    head_distances,
)
from ..diagnostics.queries import matched_anchors, plot_query_positions
from ..losses import pack_targets
from ..models import DETR
from ..postprocess import postprocess
from ..preprocess import make_padding_mask
from ..types import Memory, Target

ORIGINAL = "the decoder's queries"


class Picture(NamedTuple):
    """One image on its way through a detector."""

    pixels: np.ndarray  # (h, w, 3) uint8 RGB
    target: Target
    padding_mask: Tensor  # (1, H, W)
    memory: Memory


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a config's name, or a file")
    parser.add_argument("--weights", required=True, help="trained with it, or converted for it")
    parser.add_argument("--data", help="annotations.json:images; default: the config's test set")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--out", default="output/visualize", help="folder for the pictures")
    args = parser.parse_args(argv)
    try:
        model, examples = load(args.config, args.weights, args.data)
    except (CheckpointError, ImportError, KeyError, FileNotFoundError) as error:
        sys.exit(f"nothing drawn: {error.args[0] if error.args else error}")
    pictures = [see(model, example) for example in islice(examples, args.num_images)]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_attention(model.detector, pictures, out)
    draw_queries(model.detector, pictures, out)
    if co_heads_of(model.detector) is not None:
        draw_heads(model.detector, pictures, out)
    print(f"{len(pictures)} images; pictures are in {out}")


def load(config: str, weights: str, data: str | None) -> tuple:
    """The config's model with weights, and a generator of its test images with their objects."""
    cfg = model_zoo.get_config(config)
    from detectron2.config import instantiate  # after get_config has said what is missing

    if data:
        cfg.dataloader.test.dataset.names = data
    model = instantiate(cfg.model).eval()
    load_weights(model, weights)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, (example for batch in instantiate(cfg.dataloader.matching) for example in batch)


@torch.no_grad()
def see(model, example: dict) -> Picture:
    """Encode an image of Detectron2's mapper."""
    detector = model.detector
    images = model.preprocess_image([example])
    padding_mask = make_padding_mask(images.image_sizes, images.tensor)
    pyramid = detector.neck(detector.backbone(images.tensor), padding_mask)
    memory = detector.encoder(pyramid)
    instances = example["instances"]
    height, width = instances.image_size
    boxes = instances.gt_boxes.tensor / torch.tensor([width, height, width, height])
    pixels = example["image"].permute(1, 2, 0).numpy()
    if model.input_format == "BGR":
        pixels = pixels[..., ::-1]
    target = Target(instances.gt_classes, xyxy_to_cxcywh(boxes))
    return Picture(pixels, target, padding_mask, memory)


def draw_attention(detector: DETR, pictures: list[Picture], out: Path) -> None:
    """Score maps and IoF-IoB curves of the memory, and of the decoder's attention to it."""
    scores: dict[str, list[Tensor]] = {"encoder": [], "cross-attention": []}
    for picture in pictures:
        attention = cross_attention(detector, picture.memory).mean(0).unsqueeze(-1)  # (1, S, 1)
        for values, maps in zip((picture.memory.tokens, attention), scores.values(), strict=True):
            maps.append(_score(values, picture))
    boxes = [picture.target.boxes for picture in pictures]
    draw_score_maps([picture.pixels for picture in pictures], boxes, scores, out / "score_maps.png")
    curves = {
        name: [foreground_shares(*pair) for pair in zip(maps, boxes, strict=True)]
        for name, maps in scores.items()
    }
    plot_foreground_shares(curves, out / "iof_iob.png")


def _score(values: Tensor, picture: Picture) -> Tensor:
    """(h, w) of the image without its padding, on the CPU."""
    maps = level_maps(values, picture.memory)
    height, width = picture.pixels.shape[:2]
    return discriminability(maps, picture.padding_mask.shape[1:])[0, :height, :width].cpu()


def draw_queries(detector: DETR, pictures: list[Picture], out: Path) -> None:
    """Anchors of the queries that are matched, and of those that co-heads provide."""
    queries: dict[str, list[Tensor]] = {ORIGINAL: []}
    for picture in pictures:
        targets = pack_targets([picture.target], detector.num_classes, picture.memory.tokens)
        queries[ORIGINAL] += matched_anchors(detector, picture.memory, targets)
        if co_heads_of(detector) is None:
            continue
        with torch.no_grad():
            helped = detector.co_heads(picture.memory, picture.padding_mask, targets)
        for name, known in helped.queries.items():
            positive = known.assignment.image, known.assignment.query[0]
            queries.setdefault(name, []).append(known.queries.anchors[positive])
    plot_query_positions(queries, ORIGINAL, out / "query_positions.png")


def draw_heads(detector: DETR, pictures: list[Picture], out: Path) -> None:
    """Distances between the decoder and the co-heads, of their Grad-CAMs."""
    names = ["decoder", *detector.co_heads.heads]
    distances = torch.stack([_distances(detector, picture) for picture in pictures]).mean(0)
    draw_head_distances(names, distances, out / "head_distances.png")
    for name, conflict in zip(names, head_conflicts(distances).tolist(), strict=True):
        print(f"mean distance of {name} to the other heads: {conflict:.4f}")


def _distances(detector: DETR, picture: Picture) -> Tensor:
    """(K, K) of one image."""
    tokens = picture.memory.tokens.detach().requires_grad_()
    memory = picture.memory._replace(tokens=tokens)
    size = picture.padding_mask.shape[1:]
    queries, _ = detector.query_source(memory)
    predictions = detector.decoder(queries, memory, detector.heads)
    sizes = torch.tensor([size], device=tokens.device)
    scores = {"decoder": postprocess(predictions, sizes, 100).scores.sum()}
    for name in detector.co_heads.heads:
        (detections,) = detector.co_heads.detect(name, memory, picture.padding_mask)
        scores[name] = detections.scores.sum()
    cams = {name: grad_cam(score, memory, size) for name, score in scores.items()}
    return head_distances(cams)


def co_heads_of(detector: DETR):
    """The co-heads, or None for detectors without."""
    return getattr(detector, "co_heads", None)


if __name__ == "__main__":
    main()
