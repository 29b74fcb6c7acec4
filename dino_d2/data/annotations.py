"""Checks COCO-format annotations: what is wrong is refused, dropped or converted, never passed on.

What depends on image files is in `data/check.py`.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .findings import DataError, Findings

MAX_DROPPED = 0.1  # share of the annotations, beyond which the data is wrong rather than noisy
_FEW = 10  # drops that are never too many
_MIN_SIDE = 1e-3  # pixels
_MOST_PIXELS = 1 << 20  # of an image's side
_CUT = "box reaches out of its image by more than a pixel: cut off in training"
_TALE = 0.2  # share of boxes outside their image that asks for another reading of the numbers


def read_annotations(path: str | os.PathLike) -> dict:
    """The content of a COCO-format json, with its lists "images", "annotations", "categories".

    Raises:
        DataError: no such file, no json, or a list is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid json, perhaps cut off ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not COCO's object of lists")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list):
            raise DataError(f"{path}: {name!r} must be a list; it is {_show(content.get(name))}")
        for index, entry in enumerate(content[name]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {name}[{index}] is {_show(entry)}, not an object")
    return content


def check_annotations(content: dict, findings: Findings) -> dict:
    """Go through the entries of a COCO-format json once.

    Args:
        content: from `read_annotations`; images have sizes already.
        findings: takes what is found. After errors, the result is what is left of the content.

    Returns:
        The usable entries: {"images", "annotations", "categories"}, with the fields that training
        and evaluation of boxes need. Annotations have valid boxes
        (x, y, width, height), `iscrowd`, `area`, unique ids above 0, and their masks where they are
        well-formed, which copy-paste uses. Boxes may reach out of their image as in COCO itself.
    """
    used = {e["category_id"] for e in content["annotations"] if _is_integer(e.get("category_id"))}
    categories = _check_categories(content["categories"], used, findings)
    images = _check_images(content["images"], findings)
    ids = {category["id"] for category in categories}
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    entries = _check_fields(content["annotations"], sizes, ids, findings)
    entries = _check_boxes(entries, sizes, findings)
    _check_number_of_drops(len(content["annotations"]), findings)
    entries = _complete(entries, sizes, findings)
    _describe(images, entries, categories, findings)
    return {"images": images, "annotations": entries, "categories": categories}


def _is_number(value: object) -> bool:
    """Whether a json value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_id(value: object) -> bool:
    return _is_name(value) or _is_integer(value)


def _is_name(value: object) -> bool:
    """Whether a json value is a text that says something and can be printed."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # halves of characters, as "\\ud800"
        return False
    return True


def _show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_categories(entries: list[dict], used: set[int], findings: Findings) -> list[dict]:
    if not entries:
        findings.add("error", "categories is empty; there is nothing to detect")
    good = []
    for index, entry in enumerate(entries):
        number, name = entry.get("id"), entry.get("name")
        where = f"categories[{index}]"
        if not _is_integer(number):
            findings.add("error", "category id is no integer", f"{where}: id {_show(number)}")
        elif not _is_name(name):
            findings.add(
                "error", "category name is no text", f"{where}, id {number}: {_show(name)}"
            )
        else:
            good.append({"id": number, "name": name})
    good = _without_placeholders(good, used, findings)
    for field in ("id", "name"):
        for value, count in Counter(entry[field] for entry in good).items():
            if count > 1:
                findings.add("error", f"category {field} twice", f"{value!r}, {count} times")
    spellings = Counter(" ".join(name.casefold().split()) for name in {e["name"] for e in good})
    for spelling in (spelling for spelling, count in spellings.items() if count > 1):
        findings.add("note", "class names that differ in case or spaces only", spelling)
    numbers = sorted({entry["id"] for entry in good})
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        findings.add("note", "category ids are not 1, 2, 3, ...; classes follow their order")
    return sorted(good, key=lambda entry: entry["id"])


def _without_placeholders(entries: list[dict], used: set[int], findings: Findings) -> list[dict]:
    """Leave out classes without annotations whose name one with annotations has, too.

    Some exporters write the name of the data set as a first category.
    """
    names = {entry["name"] for entry in entries if entry["id"] in used}
    kept = []
    for entry in entries:
        if entry["name"] in names and entry["id"] not in used:
            reason = "class without annotations left out: another has its name"
            findings.add("converted", reason, f"id {entry['id']}, {entry['name']!r}")
        else:
            kept.append(entry)
    return kept


def _check_images(entries: list[dict], findings: Findings) -> list[dict]:
    ids, files, good = set(), {}, []
    for index, entry in enumerate(entries):
        reason, fields = _wrong_image(entry, ids)
        if reason:
            shown = ", ".join(f"{field} {_show(entry.get(field))}" for field in fields)
            findings.add("error", reason, f"images[{index}], {shown}")
            continue
        good.append({name: entry[name] for name in ("id", "file_name", "width", "height")})
        number, file = entry["id"], entry["file_name"]
        ids.add(number)
        if files.setdefault(file, number) != number:
            place = f"{file}: ids {files[file]} and {number}"
            findings.add("note", "image file under several ids", place)
    if len({type(number) for number in ids}) > 1:
        findings.add("error", "some image ids are integers, others strings")
    if not entries:
        findings.add("error", "there are no images")
    return good


def _wrong_image(entry: dict, ids: set) -> tuple[str, tuple[str, ...]]:
    """(reason, fields to show) of what makes an image unusable; empty without."""
    number, file = entry.get("id"), entry.get("file_name")
    if not _is_id(number):
        return "image id is neither an integer nor a text that can be printed", ("id",)
    if number in ids:
        return "image id twice", ("id",)
    if not _is_name(file):
        return "file_name is no name", ("id", "file_name")
    sides = (entry.get("width"), entry.get("height"))
    if not all(_is_integer(side) and 0 < side < _MOST_PIXELS for side in sides):
        return "width and height are no positive integers", ("id", "width", "height")
    return "", ()


def _check_fields(
    entries: list[dict], images: dict, categories: set[int], findings: Findings
) -> dict[int, dict]:
    """The entries that pass, by their index in the json."""
    good = {}
    for index, entry in enumerate(entries):
        level, reason, field = _wrong_field(entry, images, categories)
        if not reason:
            good[index] = entry
            continue
        place = f"{_place(entry, index)}: {field} {_show(entry.get(field))}"
        findings.add(level, reason, place)
    unknown = {e["category_id"] for e in entries if _is_id(e.get("category_id"))} - categories
    if categories and unknown and min(categories) == 1 and 0 in unknown:
        findings.add("error", "category ids of the annotations begin at 0, of the categories at 1")
    return good


def _place(entry: dict, index: int) -> str:
    return (
        f"image {_show(entry.get('image_id'))}, annotation {_show(entry.get('id'))} "
        f"(annotations[{index}])"
    )


def _wrong_field(entry: dict, images: dict, categories: set[int]) -> tuple[str, str, str]:
    """(level, reason, field) of the first field that cannot be used; empty strings without."""
    box, category = entry.get("bbox"), entry.get("category_id")
    if not _is_id(entry.get("image_id")):
        return "error", "image_id is neither an integer nor a text that can be printed", "image_id"
    if not _is_integer(category):
        return "error", "category_id is no integer", "category_id"
    if category not in categories:
        return "error", "category_id is of no category", "category_id"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "error", "bbox is not four numbers", "bbox"
    for flag in ("iscrowd", "ignore"):
        if entry.get(flag, 0) not in (0, 1):
            return "error", f"{flag} is neither 0 nor 1", flag
    if entry["image_id"] not in images:
        return "dropped", "annotation of an image that is not there", "image_id"
    return "", "", ""


def _check_boxes(entries: dict[int, dict], images: dict, findings: Findings) -> list[dict]:
    if not entries:
        return []
    indices, kept = list(entries), list(entries.values())
    boxes = np.array([[_as_float(v) for v in entry["bbox"]] for entry in kept])
    sizes = np.array([images[entry["image_id"]] for entry in kept], dtype=float)
    with np.errstate(invalid="ignore", over="ignore"):
        reasons = _box_problems(boxes, sizes)
        finite = np.isfinite(boxes).all(1)
        _recognise_format(boxes[finite], sizes[finite], findings)
        cut = (reasons == "") & ~_inside(boxes, sizes, 1)
    for level, found in (("dropped", reasons), ("converted", np.where(cut, _CUT, ""))):
        for row in np.flatnonzero(found != ""):
            place = f"{_place(kept[row], indices[row])}: bbox {_show(kept[row]['bbox'])}"
            findings.add(level, str(found[row]), place)
    return [entry for entry, reason in zip(kept, reasons, strict=True) if not reason]


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return float("inf")


def _box_problems(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,) the reason to drop each xywh box (n, 4) in an image of (width, height) (n, 2), or ""."""
    corner, extent = boxes[:, :2], boxes[:, 2:]
    cases = {
        "box is not finite": ~np.isfinite(boxes).all(1),
        "box has a negative width or height": (extent < 0).any(1),
        "box has no area": (extent < _MIN_SIDE).any(1),
        "box lies outside its image": ((corner >= sizes) | (corner + extent <= 0)).any(1),
        "box is more than twice as large as its image": (extent > 2 * sizes + 2).any(1),
    }
    return np.select(list(cases.values()), list(cases), "")


def _inside(boxes: np.ndarray, sizes: np.ndarray, margin: float) -> np.ndarray:
    corner, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    return ((corner >= -margin) & (end <= sizes + margin)).all(1)


def _recognise_format(boxes: np.ndarray, sizes: np.ndarray, findings: Findings) -> None:
    """Refuse boxes that are plainly not (x, y, width, height) in pixels."""
    if len(boxes) and (boxes <= 1).all() and (boxes >= 0).all() and sizes.min() > 4:
        reason = "boxes are relative to the image (0 to 1); bbox is x, y, width, height in pixels"
        findings.add("error", reason, count=len(boxes))
        return
    leaving = ~_inside(boxes, sizes, 1)
    if leaving.sum() < 3 or leaving.mean() < _TALE:
        return
    first, second = boxes[:, :2], boxes[:, 2:]
    corners, y_first = np.hstack([first, second - first]), [1, 0, 3, 2]
    readings = {
        "two corners (x0, y0, x1, y1)": corners,
        "two corners, y first (y0, x0, y1, x1)": corners[:, y_first],
        "y first (y, x, height, width)": boxes[:, y_first],
        "centre and size (cx, cy, width, height)": np.hstack([first - second / 2, second]),
    }
    for name, reading in readings.items():
        fits = _inside(reading, sizes, 1) & (reading[:, 2:] > 0).all(1)
        if fits.mean() > 0.99:
            reason = f"boxes look like {name}; bbox is x, y, width, height"
            findings.add("error", reason, count=int(leaving.sum()))
            return


def _check_number_of_drops(total: int, findings: Findings) -> None:
    dropped = findings.count("dropped")
    if dropped > max(min(_FEW, total - 1), MAX_DROPPED * total):
        reasons = ", ".join(f"{f.count} x {f.reason}" for f in findings.all("dropped"))
        findings.add(
            "error",
            f"{dropped} of {total} annotations would be dropped, more than {MAX_DROPPED:.0%}: "
            f"{reasons}",
        )


def _complete(entries: list[dict], sizes: dict, findings: Findings) -> list[dict]:
    """Add what evaluation needs: ids, area, iscrowd."""
    ids = [entry.get("id") for entry in entries]
    usable = all(_is_integer(number) and number > 0 for number in ids)
    usable = usable and len(set(ids)) == len(ids)
    if not usable:
        reason = "annotation ids that are missing, 0, no integers or not unique: numbered anew"
        findings.add("converted", reason)
    completed = []
    for number, entry in enumerate(entries, start=1):
        missing = [name for name in ("area", "iscrowd") if name not in entry]
        crowd = int(entry.get("iscrowd", 0) or entry.get("ignore", 0))
        area = entry.get("area")
        if not _is_number(area) or not math.isfinite(_as_float(area)) or area < 0:
            area = entry["bbox"][2] * entry["bbox"][3]
            missing = sorted({*missing, "area"})
        for name in missing:
            findings.add("converted", f"{name} is missing or no number: filled in")
        if entry.get("ignore", 0):
            findings.add("converted", "ignore: 1 becomes iscrowd: 1", _place(entry, number - 1))
        own = {"id": entry["id"] if usable else number, "area": area, "iscrowd": crowd}
        if _is_mask(entry.get("segmentation"), *sizes[entry["image_id"]]):
            own["segmentation"] = entry["segmentation"]
        completed.append({name: entry[name] for name in ("image_id", "category_id", "bbox")} | own)
    return completed


def _is_mask(segmentation: object, width: int, height: int) -> bool:
    """Polygons of at least three points about the image, or a run-length code of the image."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        counts = _run_lengths(counts) if isinstance(counts, str) else counts
        whole = isinstance(counts, list) and all(_is_integer(n) and n >= 0 for n in counts)
        return (
            whole and segmentation.get("size") == [height, width] and sum(counts) == width * height
        )
    polygons = segmentation if isinstance(segmentation, list) else []
    limit = 2 * max(width, height)
    return bool(polygons) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(_is_number(value) and abs(_as_float(value)) <= limit for value in polygon)
        for polygon in polygons
    )


def _run_lengths(text: str) -> list[int]:
    """Numbers of COCO's compressed code: five bits in a character, from the third number on as the
    difference to the last but one. pycocotools decodes it without looking where it writes.
    """
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (1 << shift) if bits & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _describe(images: list, entries: list, categories: list, findings: Findings) -> None:
    objects = [entry for entry in entries if not entry["iscrowd"]]
    crowds = len(entries) - len(objects)
    if crowds:
        findings.add("note", "crowd regions: no targets, and not judged in evaluation", "", crowds)
    empty = len(images) - len({entry["image_id"] for entry in objects})
    if empty:
        findings.add("note", "images without objects: trained on as background", "", empty)
    seen = {entry["category_id"] for entry in objects}
    for category in categories:
        if category["id"] not in seen:
            findings.add("note", "classes without any object", category["name"])
    keys = [(e["image_id"], e["category_id"], *e["bbox"]) for e in objects]
    twice = len(keys) - len(set(keys))
    if twice:
        findings.add("note", "objects that are there twice: same image, class and box", "", twice)


def select_images(content: dict, keep: Callable[[dict], bool]) -> dict:
    """The content with those images only for which `keep` is true, and their annotations."""
    images = [image for image in content["images"] if keep(image)]
    ids = {image["id"] for image in images}
    entries = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return {**content, "images": images, "annotations": entries}
