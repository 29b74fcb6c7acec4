"""Finds the compiled operators, `dino_d2._C`, and says which implementation is in use and why."""

import importlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

_BUILD_RECORD = Path(__file__).resolve().parent.parent / "_build.json"


class NativeStatus(NamedTuple):
    """What became of the compiled operators in this process."""

    loaded: bool
    cuda: bool  # the library carries CUDA kernels
    reason: str  # one sentence for people
    build: dict  # what setup.py recorded: torch, compiler, cuda, cuda_reason, reason; {} if lost


def _build_record() -> dict:
    try:
        return json.loads(_BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return {}


@cache
def load_native() -> NativeStatus:
    """Load `dino_d2._C` once per process. Never raises: without it the operators run in PyTorch."""
    record = _build_record()
    try:
        importlib.import_module("dino_d2._C")
    except ModuleNotFoundError:
        reason = record.get("reason") or "dino_d2 was installed without building its operators"
        return NativeStatus(False, False, reason, record)
    except ImportError as error:
        built = record.get("torch", "another version")
        reason = f"dino_d2._C was built for PyTorch {built} and does not load here: {error}"
        return NativeStatus(False, False, reason, record)
    has_cuda = bool(record.get("cuda"))
    kernels = "C++ and CUDA" if has_cuda else "C++"
    return NativeStatus(True, has_cuda, f"the compiled {kernels} kernels are loaded", record)


@cache
def warn_if_slow(device_type: str) -> None:
    """Say once per device type that an operator runs without its compiled kernel."""
    status = load_native()
    if status.loaded and (device_type == "cpu" or (device_type == "cuda" and status.cuda)):
        return
    if status.loaded:
        why = status.build.get("cuda_reason") if device_type == "cuda" else None
        reason = f"there is no compiled kernel for {device_type}" + (f", {why}" if why else "")
    else:
        reason = status.reason
    warnings.warn(
        f"ms_deform_attn runs in plain PyTorch on {device_type}, several times slower than its "
        f"compiled kernel: {reason}. `python -m dino_d2.tools.collect_env` shows the details.",
        stacklevel=3,
    )
