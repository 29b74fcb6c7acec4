"""Writes files whole or not at all."""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

CHECKSUM, UNFINISHED = ".sha256", ".unfinished"  # added to the name of a file


class WritingError(RuntimeError):
    """A file cannot be written; the message names the file and the reason."""


def replace_file(
    path: str | os.PathLike,
    write: Callable[[BinaryIO], object],
    checksum: bool = False,
    tidy: Callable[[Path], object] | None = None,
) -> None:
    """Write a file whole or not at all.

    A crash at any moment leaves the old file or the new one under the name, never a part, and
    never one beside the checksum of the other.

    Args:
        write: writes the content to the file that it gets.
        checksum: beside the file write its checksum, as `sha256sum -c` reads it.
        tidy: is called with the folder before anything is written, while no other process writes
            there.

    Raises:
        WritingError: the file cannot be written. What was there before is untouched.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise WritingError(f"{path}: cannot be written; what is there is no regular file")
    try:
        with _locked(path.parent, tidy):
            _replace(path, write, checksum)
    except (OSError, RuntimeError) as error:  # PyTorch turns one into the other
        raise _unwritable(path, write, error) from error


def beside(path: Path, suffix: str) -> Path:
    """The file beside another whose name has a suffix more."""
    return path.with_name(path.name + suffix)


def _replace(path: Path, write: Callable[[BinaryIO], object], checksum: bool) -> None:
    sums = beside(path, CHECKSUM)
    unfinished = [beside(file, UNFINISHED) for file in (path, sums)]
    try:
        digest = _write_through(unfinished[0], write)
        if checksum:
            line = f"{digest}  {path.name}\n".encode()
            _write_through(unfinished[1], lambda file: file.write(line))
        sums.unlink(missing_ok=True)
        os.replace(unfinished[0], path)
        if checksum:
            os.replace(unfinished[1], sums)
    finally:
        for file in unfinished:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _write_through(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Write a file, wait until the disk has it, and return its SHA-256."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        write(hashing)
        file.flush()
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest()


class _Hashing:
    """Passes on what is written, and knows its SHA-256 and length. Without a file, only those."""

    def __init__(self, file: BinaryIO | None = None):
        self.file, self.sha256, self.length = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        if self.file is not None:
            self.file.write(data)
            self.sha256.update(data)
        self.length += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept here."""


@contextlib.contextmanager
def _locked(folder: Path, tidy: Callable[[Path], object] | None) -> Iterator[None]:
    """One writer at a time. It finds the folder tidied; at the end, syncs the folder."""
    if fcntl is None:
        yield
        return
    directory = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that writes to %s", folder)
                fcntl.flock(directory, fcntl.LOCK_EX)
        if tidy is not None:
            tidy(folder)
        yield
        os.fsync(directory)
    finally:
        os.close(directory)


def _unwritable(path: Path, write: Callable, error: Exception) -> WritingError:
    """Says how much there was to write, and how much room."""
    cause = error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0]
    counter = _Hashing()
    with contextlib.suppress(Exception):  # then it was not the disk
        write(counter)
    try:
        room = f"{shutil.disk_usage(path.parent).free} bytes are free"
    except OSError:
        room = "the folder cannot be read"
    return WritingError(
        f"{path}: cannot be written ({reason}); it needs {counter.length} bytes, {room}. What was "
        "there before is untouched."
    )
