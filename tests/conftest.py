"""Markers that skip with a plain reason, and fixtures shared by all tests."""

import importlib.util

import pytest
import torch
from machine import find_nvcc

from dino_d2 import processes
from dino_d2.ops import load_native

REASONS = {
    "detectron2": (
        lambda: importlib.util.find_spec("detectron2") is not None,
        "Detectron2 is not installed",
    ),
    "cuda": (torch.cuda.is_available, "there is no CUDA device"),
    "nvcc": (lambda: find_nvcc() is not None, "there is no CUDA compiler (nvcc)"),
    "compiled": (lambda: load_native().loaded, f"no compiled operators: {load_native().reason}"),
}


def pytest_collection_modifyitems(items):
    absent = {name: reason for name, (present, reason) in REASONS.items() if not present()}
    for item in items:
        for name, reason in absent.items():
            if item.get_closest_marker(name):  # keywords hold the names of directories, too
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tensors so small that threads cost more than they save, on a busy machine tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_rank_of_two(monkeypatch):
    """Distributed training, in which the other process counts 7."""
    monkeypatch.setattr(processes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.distributed, "all_reduce", lambda total: total.add_(7))
