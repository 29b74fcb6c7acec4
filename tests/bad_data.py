"""Small data sets with one thing wrong."""

import copy
import json

import numpy as np
from PIL import Image

CONTENT = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 80, "height": 60},
        {"id": 9, "file_name": "b.png", "width": 40, "height": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [8, 6, 16, 12], "area": 192},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12},
    ],
    "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
}
for entry in CONTENT["annotations"]:
    entry["iscrowd"] = 0
GONE = object()  # as a value: the field is not there


def changed(**changes):
    """The content; `images`, `annotations` or `categories`: fields to change in the last entry."""
    content = copy.deepcopy(CONTENT)
    for name, fields in changes.items():
        entry = content[name][-1]
        entry.update(fields)
        for field in [field for field, value in fields.items() if value is GONE]:
            del entry[field]
    return content


def added(name, /, **fields):
    """The content with one more entry: a copy of the last with other fields."""
    content = copy.deepcopy(CONTENT)
    content[name].append({**content[name][-1], **fields})
    return content


def with_boxes(boxes, width=80, height=60):
    """The content with these boxes in its first image."""
    content = copy.deepcopy(CONTENT)
    content["images"][0].update(width=width, height=height)
    content["annotations"] = [
        {**content["annotations"][0], "id": number, "bbox": list(map(float, box))}
        for number, box in enumerate(boxes, start=1)
    ]
    return content


def write(folder, content=CONTENT, **pictures):
    """Write a data set; pictures: by name, in place of the usual; returns (json, folder)."""
    folder.mkdir(exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for name, size in (("a", (60, 80, 3)), ("b", (50, 40, 3))):
        picture = pictures.get(name) or Image.fromarray(rng.integers(0, 256, size, np.uint8))
        picture.save(folder / f"{name}.png")
    return folder / "annotations.json", folder
