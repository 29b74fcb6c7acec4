"""Reads the reference numbers in tests/golden; see its README.md."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent / "golden"


def draw(name, shape, mean=0.0, std=1.0, kind="normal"):
    """A parameter's values, from its official name alone."""
    if kind == "const":
        return np.full(shape, mean)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    value = mean + std * noise
    return np.abs(value) if kind == "abs" else value


def official_state(case: str) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the published checkpoint."""
    spec = json.loads((ROOT / case / "spec.json").read_text())
    state = {name: torch.from_numpy(draw(name, **how)) for name, how in spec["parameters"].items()}
    state.update({alias: state[name] for alias, name in spec["aliases"].items()})
    return state


def image(seed: int, height: int, width: int) -> torch.Tensor:
    """(3, height, width) uint8 RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def read_json(case: str, name: str = "case") -> dict:
    return json.loads((ROOT / case / f"{name}.json").read_text())


def read_arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / case / "out.npz") as file:
        return dict(file)


def assert_probe(arrays, name, tensor, tolerance):
    """Compare a tensor with a stored probe of it."""
    values = tensor.detach().numpy().reshape(-1)
    scale = max(1.0, np.abs(arrays[f"{name}.val"]).max())
    np.testing.assert_allclose(
        values[arrays[f"{name}.idx"]], arrays[f"{name}.val"], rtol=0, atol=tolerance * scale
    )
    np.testing.assert_allclose(
        [values.mean(), values.std()], arrays[f"{name}.meanstd"], rtol=0, atol=tolerance * scale
    )
