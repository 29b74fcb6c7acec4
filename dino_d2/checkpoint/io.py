"""Reads and writes weight files. Nothing that a file contains is ever executed."""

import argparse
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import files
from ..files import CHECKSUM, UNFINISHED, WritingError, beside

_NESTS = ("model", "state_dict", "model_state", "blobs")  # where repositories put the weights


class CheckpointError(RuntimeError):
    """A weight file cannot be used; the message names the file and the reason."""


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a weight file, on the CPU.

    .safetensors; .pth, .pt and other files of `torch.save`, with `weights_only=True` whatever the
    environment says; .pkl of Detectron2's model zoo, limited to dictionaries of numpy arrays.

    Raises:
        CheckpointError: the file is missing, damaged, holds no weights, or would have to run code.
    """
    try:
        weights = find_weights(read_content(path))
    except TypeError as error:  # an array of strings or objects
        raise CheckpointError(f"{path}: holds what is no weight ({error})") from error
    if not weights:
        raise CheckpointError(f"{path}: there are no weights in this file")
    return weights


def read_content(path: str | os.PathLike) -> dict:
    """Everything in a weight file, a trainer's state for example; see `read_weights`."""
    path = Path(path)
    verify(path)
    readers = {".safetensors": _read_safetensors, ".pkl": _read_pickle}
    content = readers.get(path.suffix, _read_torch)(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    return dict(content)


def peek(path: str | os.PathLike) -> dict:
    """What `read_content` returns, of a file of `torch.save`, not verified and mapped to memory."""
    content = _read_torch(Path(path), mmap=True)
    return dict(content) if isinstance(content, Mapping) else {}


def verify(path: str | os.PathLike) -> None:
    """Compare a file with the checksum beside it; without one, a zip archive with its own.

    Raises:
        CheckpointError: the file is missing or has changed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    checksum = beside(path, CHECKSUM)
    if checksum.is_file():
        if checksum.read_text().split()[:1] != [_sha256(path)]:
            raise CheckpointError(f"{path}: damaged; it does not match {checksum.name}")
    elif zipfile.is_zipfile(path):
        try:  # PyTorch writes checksums into its archives but does not read them
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except Exception as error:  # damaged archives fail in many ways
            raise _unreadable(path, error) from error
        if damaged:
            raise CheckpointError(f"{path}: damaged; {damaged} in it does not match its checksum")


def write_weights(weights: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a weight file, .safetensors or .pth as {"model": weights}; see `replace_file`."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise CheckpointError(f"{path}: the name must end in .safetensors or .pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    # a safetensors file holds every tensor by itself
    weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        replace_file(path, lambda file: file.write(safetensors.torch.save(weights)))
    else:
        replace_file(path, lambda file: torch.save({"model": weights}, file))


def replace_file(
    path: str | os.PathLike, write: Callable[[BinaryIO], object], checksum: bool = True
) -> None:
    """Write a checkpoint as `files.replace_file` does, and clear away what a killed writer left.

    Raises:
        CheckpointError: the file cannot be written. What was there before is untouched.
    """
    try:
        files.replace_file(path, write, checksum, _tidy)
    except WritingError as error:
        raise CheckpointError(str(error)) from error


def _tidy(folder: Path) -> None:
    """Delete unfinished checkpoints, and checksums of those that are gone."""
    for file in folder.glob(f"*.pth*{UNFINISHED}"):
        file.unlink(missing_ok=True)
    for file in folder.glob(f"*.pth{CHECKSUM}"):
        if not file.with_suffix("").exists():
            file.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a valid safetensors file ({error})") from error


def _read_torch(path: Path, mmap: bool = False) -> object:
    # Official checkpoints carry their command line, which is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # damaged archives fail in many ways
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked:
                raise CheckpointError(
                    f"{path}: refused, because reading it would need more than weights and plain "
                    f"data and could run code (it asks for {asked[1]})"
                ) from error
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    # The first sentence: PyTorch's further ones advise to trust the file.
    reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
    return CheckpointError(f"{path}: cannot be read; damaged, or no weight file ({reason})")


class _ForbiddenError(Exception):
    """A pickle asks for something that is not part of a numpy array."""


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dictionaries of numpy arrays and nothing else."""

    _ALLOWED = {
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module, name):
        if (module, name) not in self._ALLOWED:
            raise _ForbiddenError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        try:
            return _ArraysOnly(file, encoding="latin1").load()
        except _ForbiddenError as error:
            raise CheckpointError(
                f"{path}: refused, because a .pkl file may hold numpy arrays only ({error})"
            ) from error
        except Exception as error:
            raise _unreadable(path, error) from error


def find_weights(content: Mapping) -> dict[str, Tensor]:
    """The tensors in the content of a weight file, wherever its author put them."""
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping):
            return find_weights(content[nest])
    weights = {
        name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in content.items()
    }
    return {
        name: value
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
