"""Writes texts and COCO-format jsons, whole or not at all."""

import contextlib
import json
import os
from pathlib import Path

from ..files import replace_file


def write_annotations(content: dict, path: str | os.PathLike) -> None:
    """Write a COCO-format json; for errors, see `write_text`."""
    write_text(json.dumps(content, allow_nan=False), path)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a file, and its folder.

    Raises:
        WritingError: it cannot be written. What was there before is untouched.
    """
    path = Path(path)
    with contextlib.suppress(OSError):  # writing says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(text.encode()))
