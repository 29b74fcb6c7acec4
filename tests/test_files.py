"""Files are written whole or not at all. How checkpoints are: tests/checkpoint/test_io.py."""

import os

import pytest

from dino_d2.checkpoint import CheckpointError, write_weights
from dino_d2.data.writing import write_text
from dino_d2.files import WritingError, replace_file


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_only_the_file_that_is_named_changes(tmp_path):
    """Checkpoints of others may be in the folder that a page is written to."""
    kept = dict.fromkeys(("a.pth.sha256", "a.pth.unfinished", "a.json.unfinished"), b"1")
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    for text in ("old", "new"):
        write_text(text, tmp_path / "b.html")
    assert content(tmp_path) == kept | {"b.html": b"new"}


def test_the_folder_is_made(tmp_path):
    write_text("text", tmp_path / "a" / "b" / "c.txt")
    assert content(tmp_path / "a" / "b") == {"c.txt": b"text"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, make):
    path = tmp_path / "a.pth"
    make(path)
    kind = path.stat().st_mode
    message = r"a\.pth: cannot be written; what is there is no regular file"
    with pytest.raises(WritingError, match=message):
        write_text("text", path)
    with pytest.raises(CheckpointError, match=message):
        write_weights({}, path)
    assert path.stat().st_mode == kind
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_to_a_file_is_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").symlink_to("a")
    write_text("new", tmp_path / "b")
    assert content(tmp_path) == {"a": b"old", "b": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, RuntimeError])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    def fail(file):
        file.write(b"part")
        raise error("no more")

    (tmp_path / "a").write_text("old")
    wanted = WritingError if error in (OSError, RuntimeError) else error
    with pytest.raises(wanted, match="no more"):
        replace_file(tmp_path / "a", fail, checksum=True)
    assert content(tmp_path) == {"a": b"old"}
