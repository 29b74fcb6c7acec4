"""Checks a data set, annotations and image files together."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .annotations import check_annotations, read_annotations, select_images
from .findings import DataError, Findings
from .images import ImageFacts, forms_of, looks_damaged, read_facts, read_image, resolve

logger = logging.getLogger("detectron2.dino_d2")


class Checked(NamedTuple):
    """A data set that has been checked."""

    annotations: Path
    images: Path  # the folder
    content: dict  # what is usable, see `check_annotations`
    findings: Findings

    @property
    def classes(self) -> list[str]:
        """Names in the order of their numbers."""
        return [category["name"] for category in self.content["categories"]]

    @property
    def changed(self) -> bool:
        """Whether the content is not the json's."""
        return self.findings.count("dropped", "converted") > 0


def load_checked(
    annotations: str | os.PathLike, images: str | os.PathLike, file_parts: int | None = None
) -> Checked:
    """Read a COCO-format json and check all that needs no decoding of images.

    Images that the json gives no size are opened for it. Arguments are those of `check_data_set`.

    Raises:
        DataError: the data cannot be used; the message names entries and fields.
    """
    checked = check_data_set(annotations, images, "none", file_parts)
    checked.findings.raise_errors()
    return checked


def check_data_set(
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    files: str = "decode",
    file_parts: int | None = None,
) -> Checked:
    """Check a data set and tell everything that is wrong, at once.

    Args:
        annotations, images: a COCO-format json and its image folder.
        files: how to look at the images: "decode" them all, read their "heads", or "none".
        file_parts: how many parts of every file_name, counted from its end, lead from the image
            folder to the file; all by default.

    Returns:
        The usable content, without images that cannot be read, and what was found.

    Raises:
        DataError: the json itself cannot be read.
        ValueError: an unknown way to look at images.
    """
    if files not in ("decode", "heads", "none"):
        raise ValueError(f"files must be decode, heads or none, not {files!r}")
    findings = Findings(annotations)
    content = read_annotations(annotations)
    _adapt_names(content["images"], images, file_parts, findings)
    _fill_sizes(content["images"], images, findings)
    content = check_annotations(content, findings)
    if files == "none":
        _check_names(content["images"], images, findings)
    else:
        content = _check_files(content, images, findings, files == "decode")
    return Checked(Path(annotations), Path(images), content, findings)


def check_splits_apart(first: Checked, second: Checked) -> None:
    """Note in the second's findings which of its images the first one has, too."""
    known = {(first.images / image["file_name"]).resolve() for image in first.content["images"]}
    for image in second.content["images"]:
        if (second.images / image["file_name"]).resolve() in known:
            reason = f"images that are in {first.annotations}, too"
            second.findings.add("note", reason, image["file_name"])


def _adapt_names(
    entries: list[dict], root: str | os.PathLike, file_parts: int | None, findings: Findings
) -> None:
    last = slice(-file_parts if file_parts else None, None)
    for entry in entries:
        name = entry.get("file_name")
        if not isinstance(name, str):
            continue
        plain, of_windows = ("/".join(form.split("/")[last]) for form in forms_of(name))
        if plain != of_windows and not os.path.exists(os.path.join(root, plain)):
            findings.add("converted", "file_name with backslashes, which become slashes", plain)
            plain = of_windows
        entry["file_name"] = plain


def _fill_sizes(entries: list[dict], root: str | os.PathLike, findings: Findings) -> None:
    for entry in entries:
        absent = entry.get("width") is None or entry.get("height") is None
        if absent and isinstance(entry.get("file_name"), str):
            try:
                facts = read_facts(resolve(root, entry["file_name"]))
            except DataError as error:
                findings.add("error", "image without a size, and no file to take it from",
                             f"image {entry.get('id')}: {error}")  # fmt: skip
            else:
                entry["width"], entry["height"] = facts.size
                findings.add("converted", "width and height are missing: taken from the file")


def _check_names(entries: list[dict], root: str | os.PathLike, findings: Findings) -> None:
    for entry in entries:
        try:
            resolve(root, entry["file_name"])
        except DataError as error:
            place = f"image {entry['id']}: file_name {entry['file_name']!r} {error}"
            findings.add("error", "image file not in its folder", place)


def _check_files(content: dict, root: str | os.PathLike, findings: Findings, decode: bool) -> dict:
    usable = set()
    for entry, outcome in _look_at(content["images"], root, decode):
        where = f"image {entry['id']}"
        if isinstance(outcome, DataError):
            findings.add("error", "image cannot be used", f"{where}: {outcome}")
            continue
        facts, damaged = outcome
        problem = size_problem(entry, facts)
        if problem:
            findings.add("error", "image of another size than the json says", f"{where}: {problem}")
            continue
        if damaged:
            findings.add("note", "image is perhaps damaged: a run of zeros in its coded data",
                         f"{where}: {entry['file_name']}")  # fmt: skip
        if (Path(root) / entry["file_name"]).is_symlink():
            findings.add("note", "image files that are symbolic links, which are followed")
        for remark in facts.remarks:
            findings.add("converted", f"image: {remark}", f"{where}: {entry['file_name']}")
        usable.add(entry["id"])
    return select_images(content, lambda image: image["id"] in usable)


def read_entry(entry: dict, path: str | os.PathLike) -> np.ndarray:
    """The pixels of an image, (h, w, 3) uint8 RGB, read as the checks read it.

    What is converted is logged, every reason once per process.

    Args:
        entry: its "file_name", for messages, and "width" and "height" where they are known.

    Raises:
        DataError: the file cannot be read or has another size.
    """
    pixels, facts = read_image(path)
    problem = size_problem(entry, facts)
    if problem:
        raise DataError(problem)
    for remark in facts.remarks:
        _log_once(remark, path)
    return pixels


_logged: set[str] = set()


def _log_once(remark: str, path: str | os.PathLike) -> None:
    if remark not in _logged:
        _logged.add(remark)
        logger.warning("%s: %s; others like it are not named", path, remark)


def size_problem(entry: dict, facts: ImageFacts) -> str:
    """How a json's width and height differ from the file's, or ""."""
    stated = (entry.get("width", facts.size[0]), entry.get("height", facts.size[1]))
    if stated == facts.size:
        return ""
    problem = f"{entry['file_name']}: {stated[0]} x {stated[1]} in the json, " \
              f"{facts.size[0]} x {facts.size[1]} in the file"  # fmt: skip
    if facts.orientation >= 5 and stated == facts.stored:
        problem += (
            f"; the json has the size before the file's EXIF turn ({facts.orientation}): if the "
            "boxes were drawn without the turn, remove it from the file, else swap the json's sizes"
        )
    elif stated == facts.size[::-1]:
        problem += "; width and height are swapped"
    return problem


def _look_at(
    entries: list[dict], root: str | os.PathLike, decode: bool
) -> Iterator[tuple[dict, DataError | tuple[ImageFacts, bool]]]:
    """Every entry with the facts of its file and whether it looks damaged, or what is wrong."""

    def look(entry: dict):
        try:
            path = resolve(root, entry["file_name"])
            if not decode:
                return read_facts(path), False
            return read_image(path)[1], looks_damaged(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the GIL
        yield from zip(entries, pool.map(look, entries), strict=True)
