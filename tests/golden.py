"""Reads the reference numbers in tests/golden, and compares with them; see its README.md."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_d2.checkpoint.names import LABELS_AND_CONTENT, rename
from dino_d2.preprocess import batch_images
from dino_d2.transformer.denoising import Noise
from dino_d2.types import Target

ROOT = Path(__file__).parent / "golden"
# weights that hold two of ours
JOINED = {LABELS_AND_CONTENT: ("denoising.label_embed.weight", "query_source.content")}


def draw(name, shape, mean=0.0, std=1.0, kind="normal", dtype=None):
    """A parameter's values, from its official name alone."""
    if kind == "const":
        return np.full(shape, mean, dtype)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    value = mean + std * noise
    return np.abs(value) if kind == "abs" else value


def official_state(case: str) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the published checkpoint."""
    spec = json.loads((ROOT / case / "spec.json").read_text())
    state = {name: torch.as_tensor(draw(name, **how)) for name, how in spec["parameters"].items()}
    state.update({alias: state[name] for alias, name in spec["aliases"].items()})
    return state


def image(seed: int, height: int, width: int) -> torch.Tensor:
    """(3, height, width) uint8 RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def make_batch(given):
    """Normalised images and their padding mask, from what a case says about its input."""
    images = [image(**i).double() for i in given["images"]]
    mean, std = ([255 * x for x in given[key]] for key in ("mean", "std"))
    return batch_images(images, mean, std)


def make_targets(targets):
    """Targets as a case lists them; None stands for two images without objects."""
    return [
        Target(
            torch.tensor(t["labels"], dtype=torch.int64),
            torch.tensor(t["boxes"], dtype=torch.float64).reshape(-1, 4),
        )
        for t in targets or [{"labels": [], "boxes": []}] * 2
    ]


def make_noise(counts, repeats, replaced, labels, directions, amounts):
    """The official draws, a value for each repeat, image and object in turn, as (B, R, T)."""
    shape = (len(counts), repeats, max(counts, default=0))
    noise = Noise(
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.int64),
        torch.ones(*shape, 4, dtype=torch.float64),
        torch.zeros(*shape, 4, dtype=torch.float64),
    )
    slots = [(b, r, t) for r in range(repeats) for b, n in enumerate(counts) for t in range(n)]
    where = tuple(np.array(slots, np.int64).reshape(-1, 3).T)
    for part, values in zip(noise, (replaced, labels, directions, amounts), strict=True):
        part[where] = torch.from_numpy(np.asarray(values)).to(part.dtype)
    return noise


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


def assert_near(actual, expected, tolerance=2e-6):
    """Relative to the largest of all, or to 1."""
    scale = max(1.0, float(np.abs(expected).max()))
    actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def our_loss_name(official):
    """tgt_loss_ce_3 -> loss_class_dn_3, loss_ce_interm -> loss_class_enc; None for another one."""
    found = re.fullmatch(r"(tgt_)?loss_(ce|bbox|giou)(_interm|_dn)?(_\d)?", official)
    if not found:
        return None
    noised, kind, group, layer = found.groups()
    kind = {"ce": "class"}.get(kind, kind)
    group = "dn" if noised else {"_interm": "enc", "_dn": "dn"}.get(group)
    return f"loss_{kind}" + (f"_{group}" if group else "") + (layer or "")


def assert_losses(losses, official, weights, denoising):
    """All losses that have an official weight; the others are only logged."""
    wanted = {our_loss_name(n): loss * weights[n] for n, loss in official.items() if n in weights}
    wanted = {name: loss for name, loss in wanted.items() if denoising or "_dn" not in name}
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name


def gradient_norm(parameters):
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def assert_gradient_norms(model, norms, total, table, rel=1e-7):
    """`norms` by official names, which `table` renames, None without any; and that of all."""
    parameters = dict(model.named_parameters())
    for official, norm in norms.items():
        name = rename(official, table)
        found = [parameters[n] for n in JOINED.get(name, (name,)) if n in parameters]
        assert gradient_norm(found) == pytest.approx(norm or 0, rel=rel, abs=1e-12), official
    assert gradient_norm(parameters.values()) == pytest.approx(total, rel=1e-7)


def record_matching(model, monkeypatch):
    """A dictionary that gets the assignments of the model's next losses, by group."""
    seen, match = {}, model.matcher

    def record(*groups):
        seen.update(match(*groups))
        return seen

    monkeypatch.setattr(model, "matcher", record)
    return seen


def pairs_of(assignment, counts, layer, image):
    """Query and object of one layer and image, objects counted from the image's first."""
    chosen = assignment.image == image
    start = sum(counts[:image])
    return assignment.query[layer, chosen], assignment.target[layer, chosen] - start
