"""CrowdHuman's annotations (Shao et al., 2018) as COCO's."""

import json
import os
from pathlib import Path

from .findings import DataError
from .images import read_facts, resolve
from .writing import write_annotations

BOXES = {"full": "fbox", "visible": "vbox", "head": "hbox"}


def convert_crowdhuman(
    odgt: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike,
    boxes: str = "full",
) -> dict:
    """Write an .odgt file of CrowdHuman as a COCO-format json with one class, "person".

    Regions that the data set ignores become crowd regions.

    Args:
        images: the folder of ID.jpg, opened for their sizes.
        boxes: "full", "visible" or "head". Full bodies may reach out of the image.

    Returns:
        What was written.

    Raises:
        DataError: a line or an image cannot be read; the message names it.
        ValueError: unknown boxes.
    """
    if boxes not in BOXES:
        raise ValueError(f"boxes must be in {[*BOXES]}, not {boxes!r}")
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    lines = Path(odgt).read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            name, found = f"{entry['ID']}.jpg", entry["gtboxes"]
            objects = [_object(thing, BOXES[boxes]) for thing in found]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{odgt}, line {number}: {type(error).__name__}: {error}") from error
        width, height = read_facts(resolve(images, name)).size
        size = {"width": width, "height": height}
        content["images"].append({"id": number, "file_name": name, **size})
        for fields in filter(None, objects):
            own = {"id": len(content["annotations"]) + 1, "image_id": number}
            content["annotations"].append({**own, "category_id": 1, **fields})
    write_annotations(content, out)
    return content


def _object(thing: dict, kind: str) -> dict | None:
    """Box, area and crowd flag; None for a head that is not there."""
    if kind not in thing:
        return None
    box, extra = thing[kind], thing.get("extra", {})
    if kind == "hbox":
        extra = thing.get("head_attr", {})
    ignored = thing["tag"] != "person" or extra.get("ignore", 0) == 1
    return {"bbox": box, "area": box[2] * box[3], "iscrowd": int(ignored)}
