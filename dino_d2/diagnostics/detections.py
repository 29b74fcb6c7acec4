"""Detections beside the truth."""

import json
from os import PathLike
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image


def draw_detections(
    annotations: str | PathLike,
    images: str | PathLike,
    results: str | PathLike,
    out: str | PathLike,
    num_images: int = 6,
    min_score: float = 0.3,
) -> None:
    """Draw a picture of the images with most objects: ground truth above, detections below.

    Args:
        annotations, images: a COCO-format json and its image folder.
        results: detections in COCO's result format, as evaluators write them.
        out: file to write.
        min_score: of the detections to show, in [0, 1].
    """
    content = json.loads(Path(annotations).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    truth = _by_image(content["annotations"])
    found = _by_image(d for d in json.loads(Path(results).read_text()) if d["score"] >= min_score)
    shown = sorted(content["images"], key=lambda i: -len(truth.get(i["id"], [])))[:num_images]
    figure = Figure(figsize=(3 * len(shown), 6.4))
    rows = figure.subplots(2, len(shown), squeeze=False)
    for image, upper, lower in zip(shown, *rows, strict=True):
        pixels = Image.open(Path(images) / image["file_name"])
        for axes, objects in ((upper, truth), (lower, found)):
            axes.imshow(pixels)
            axes.set_axis_off()
            for entry in objects.get(image["id"], []):
                draw_box(axes, entry, names)
    rows[0][0].set_title("ground truth", loc="left")
    rows[1][0].set_title(f"detections with score >= {min_score}", loc="left")
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def _by_image(entries) -> dict[int, list[dict]]:
    grouped: dict[int, list[dict]] = {}
    for entry in entries:
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped


def draw_box(axes, entry: dict, names: dict[int, str]) -> None:
    """Draw a COCO entry, xywh, dashed if it is a crowd; names: of the categories by id."""
    x, y, width, height = entry["bbox"]
    colour = f"C{sorted(names).index(entry['category_id']) % 10}"
    style = "--" if entry.get("iscrowd") else "-"
    axes.add_patch(
        Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=2, linestyle=style)
    )
    label = names[entry["category_id"]]
    if "score" in entry:
        label += f" {entry['score']:.2f}"
    style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    axes.text(x, y, label, fontsize=7, color="white", va="bottom", bbox=style, parse_math=False)
