"""A page about a data set: what the checks found, counts, sizes, samples with their boxes."""

import base64
import html
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..data.check import Checked
from ..data.findings import DataError
from ..data.images import read_image, resolve
from ..data.writing import write_text
from .detections import draw_box

_SAMPLES = 8
_SAMPLE_SIDE = 480  # pixels
_MOST_CLASSES = 40  # in the diagram
_STYLE = """body { font-family: sans-serif; max-width: 70em; margin: 2em auto; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left }
th { border-bottom: 1px solid #999 } img { max-width: 100% }
.error { color: #b00020 } .dropped { color: #a15c00 } .converted { color: #00558b }"""


def write_page(splits: Mapping[str, Checked], path: str | os.PathLike) -> None:
    """Write one html file that needs no other file.

    Args:
        splits: checked data sets by name.
    """
    parts = [f"<!doctype html><meta charset='utf-8'><title>Data set</title><style>{_STYLE}</style>"]
    for name, checked in splits.items():
        source = html.escape(f"{checked.annotations}, images in {checked.images}")
        parts += [f"<h1>{html.escape(name)}</h1><p>{source}</p>", _counts(checked.content)]
        parts += [_findings(checked), _as_img(draw_statistics(checked.content))]
        parts.append(_as_img(draw_samples(checked)))
    write_text("\n".join(parts), path)


def draw_statistics(content: dict) -> Figure:
    """Objects by class, their sizes, objects by image, sizes of the images."""
    figure = Figure(figsize=(12, 7))
    (classes, sizes), (per_image, images) = figure.subplots(2, 2)
    objects = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    _draw_classes(classes, content["categories"], objects)
    sides = [np.sqrt(entry["bbox"][2] * entry["bbox"][3]) for entry in objects]
    _draw_histogram(sizes, sides, "objects by size: square root of width x height, in pixels")
    for limit in (32, 96):  # COCO's borders of small, medium and large
        sizes.axvline(limit, color="grey", linestyle=":")
    counts = Counter(entry["image_id"] for entry in objects)
    numbers = [counts[image["id"]] for image in content["images"]]
    bins = max(1, min(40, max(numbers, default=0) + 1))
    per_image.hist(numbers, bins=np.linspace(-0.5, max(numbers, default=0) + 0.5, bins + 1))
    per_image.set_title("images by number of objects")
    shapes = [(image["width"], image["height"]) for image in content["images"]]
    images.scatter(*np.array(shapes or [(0, 0)]).T, s=9, alpha=0.4)
    images.set_title("widths and heights of the images")
    figure.tight_layout()
    return figure


def _draw_classes(axes, categories: Sequence[dict], objects: Sequence[dict]) -> None:
    counts = Counter(entry["category_id"] for entry in objects)
    order = sorted(categories, key=lambda category: -counts[category["id"]])
    shown = order[:_MOST_CLASSES]
    axes.bar(range(len(shown)), [counts[category["id"]] for category in shown])
    names = [category["name"][:20] for category in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=7, parse_math=False)
    most = f", the {len(shown)} most frequent of {len(order)}" if len(order) > len(shown) else ""
    axes.set_title(f"objects by class{most}")


def _draw_histogram(axes, values: Sequence[float], title: str) -> None:
    if len(values):
        low, high = max(min(values), 1e-3), max(*values, 2e-3)
        axes.hist(values, bins=np.geomspace(low, max(high, 1.01 * low), 40))
        axes.set_xscale("log")
    axes.set_title(title)


def draw_samples(checked: Checked) -> Figure:
    """Images with their boxes, evenly spread over the data set."""
    content = checked.content
    names = {category["id"]: category["name"] for category in content["categories"]}
    step = max(1, len(content["images"]) // _SAMPLES)
    shown = content["images"][::step][:_SAMPLES]
    columns = 4
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(14, 3.6 * rows))
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in all_axes:
        axes.set_axis_off()
    for axes, image in zip(all_axes, shown, strict=False):
        _draw_sample(axes, checked, image, names)
    figure.tight_layout()
    return figure


def _draw_sample(axes, checked: Checked, image: dict, names: dict[int, str]) -> None:
    axes.set_title(f"{image['id']}: {image['file_name'][-40:]}", fontsize=7, parse_math=False)
    try:
        pixels, _ = read_image(resolve(checked.images, image["file_name"]))
    except DataError:  # it is among the findings
        return
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
    axes.imshow(picture, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    for entry in checked.content["annotations"]:
        if entry["image_id"] == image["id"]:
            draw_box(axes, entry, names)


def _counts(content: dict) -> str:
    crowds = sum(entry["iscrowd"] for entry in content["annotations"])
    rows = {
        "images": len(content["images"]),
        "objects": len(content["annotations"]) - crowds,
        "crowd regions": crowds,
        "classes": len(content["categories"]),
    }
    cells = "".join(f"<tr><td>{name}</td><td>{count}</td></tr>" for name, count in rows.items())
    return f"<table>{cells}</table>"


def _findings(checked: Checked) -> str:
    rows = [
        f"<tr class='{found.level}'><td>{found.level}</td><td>{html.escape(found.reason)}</td>"
        f"<td>{found.count}</td><td>{html.escape('; '.join(found.places))}</td></tr>"
        for found in checked.findings.all()
    ]
    head = "<tr><th></th><th>found</th><th>times</th><th>for example</th></tr>"
    return f"<h2>Checks</h2><table>{head}{''.join(rows)}</table>" if rows else "<p>No remarks.</p>"


def _as_img(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return f"<img src='data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}'>"
