"""Finds the jsons and image folders of a data set, and splits one without validation images."""

import hashlib
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from .annotations import read_annotations, select_images
from .findings import DataError
from .images import forms_of

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "test": "test",
           "validation": "val", "dev": "val", "minival": "val", "testing": "test"}  # fmt: skip
_PROBED = 20  # images by which a folder is recognised


class Source(NamedTuple):
    """A json with its image folder."""

    annotations: Path
    images: Path


def find_sources(data: str | os.PathLike) -> dict[str, Source]:
    """Sources by split: "train", and "val" and "test" where they are.

    Args:
        data: "annotations.json:image_folder"; a json, whose images are looked for around it; or a
            folder with jsons in it or one level below, such as COCO's (annotations/, train2017/),
            one folder per split (train/annotations.json), or one json.

    Raises:
        DataError: nothing is found, more than one json for a split, or one that cannot be used.
    """
    text = os.fspath(data)
    if not text:
        raise DataError("the name of the data set is empty")
    pair = split_pair(text)
    if pair:
        return {"train": pair}
    if Path(text).is_dir():
        return _find_in_folder(Path(text))
    return {"train": Source(Path(text), find_images(Path(text)))}


def split_pair(text: str) -> Source | None:
    """The two paths of "annotations.json:image_folder", in which further colons may be."""
    found = re.fullmatch(r"(.+?\.json):(.+)", text, re.IGNORECASE | re.DOTALL)
    return Source(Path(found[1]), Path(found[2])) if found else None


def find_images(annotations: Path) -> Path:
    """The folder that holds the images of a json.

    Raises:
        DataError: no folder near the json has them.
    """
    names = [entry.get("file_name") for entry in read_annotations(annotations)["images"]]
    if not names:
        raise DataError(f"{annotations}: there are no images")
    probed = [name for name in names if isinstance(name, str) and name][:_PROBED]
    split = _split_of(annotations)
    tops = (annotations.parent, annotations.parent.parent)
    found = [tops[0], tops[0] / "images", *(f for top in tops for f in _folders(top)), tops[1]]
    found.sort(key=lambda folder: split != _split_of(folder / "x") or split is None)
    for folder in found:
        if any(os.path.exists(folder / form) for name in probed for form in forms_of(name)):
            return folder
    raise DataError(
        f"{annotations}: its images (such as {probed[:2]}) are in no folder near it; give "
        f"'{annotations}:image_folder'"
    )


def _folders(top: Path) -> list[Path]:
    """Folders up to two levels below."""
    first = sorted(f for f in top.iterdir() if f.is_dir())
    return first + [g for f in first for g in sorted(f.iterdir()) if g.is_dir()]


def _find_in_folder(folder: Path) -> dict[str, Source]:
    files = sorted(f for depth in ("*", "*/*") for f in folder.glob(depth + ".[jJ][sS][oO][nN]"))
    files = [f for f in files if f.name.startswith("instances")] or files
    by_split: dict[str | None, list[Path]] = {}
    unusable: dict[str | None, DataError] = {}  # the first of each
    for file in files:
        split = _split_of(file.relative_to(folder))
        try:
            read_annotations(file)
        except DataError as error:
            unusable.setdefault(split, error)
        else:
            by_split.setdefault(split, []).append(file)
    for split in ("train", "val"):  # rather than train without it
        if split in unusable and split not in by_split:
            way_out = "move it away or give 'annotations.json:image_folder'"
            raise DataError(f"{unusable[split]}; {way_out}") from unusable[split]
    if None in by_split:
        by_split.setdefault("train", []).extend(by_split.pop(None))
    for split, candidates in by_split.items():
        if len(candidates) > 1:
            names = ", ".join(str(f.relative_to(folder)) for f in candidates)
            raise DataError(f"{folder}: several jsons for {split}: {names}; give one of them")
    if "train" not in by_split:
        raise DataError(
            f"{folder}: there is no COCO-format json for training in it or one level below"
            + (f" ({unusable[None]})" if None in unusable else "")
        )
    return {split: Source(file, find_images(file)) for split, (file,) in by_split.items()}


def _split_of(file: Path) -> str | None:
    """The split that a file's name or else its folder's names."""
    for name in (file.stem, file.parent.name):
        for word in re.findall(r"[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def split_content(content: dict, share: float = 0.1) -> tuple[dict, dict]:
    """Split a data set into training and validation, always in the same way.

    A share of the images, at least one, whose names have the smallest hashes, validates.

    Raises:
        DataError: there are fewer than two images.
    """
    names = sorted({image["file_name"] for image in content["images"]}, key=_hash)
    if len(names) < 2:
        raise DataError("one image cannot be split into training and validation")
    held_out = set(names[: min(len(names) - 1, math.ceil(share * len(names)))])
    return (
        select_images(content, lambda image: image["file_name"] not in held_out),
        select_images(content, lambda image: image["file_name"] in held_out),
    )


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
