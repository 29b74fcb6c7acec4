"""Moves the weights of classes between detectors of other classes, by the classes' names."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .io import CheckpointError

logger = logging.getLogger("detectron2.dino_d2")

_OF_CLASSES = ("class_head", "label_embed")  # parts of the names of weights with a row per class


class ClassNames(NamedTuple):
    """Names of classes in the order of their numbers."""

    given: Sequence[str]  # those of the weights; "" for numbers of no class
    wanted: Sequence[str]  # those of the model


def map_classes(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], classes: ClassNames
) -> dict[str, Tensor]:
    """Give every class of the model the rows that the weights have for the class of its name.

    Case, spaces, hyphens and underscores in names do not matter. Classes that the weights do not
    know keep the model's rows, as it was initialised. What is kept, dropped and initialised is
    logged.

    Args:
        weights: to load; heads and label embeddings have a row (weight) or number (bias) per class.
        wanted: the model's state dict.

    Raises:
        CheckpointError: a head of the weights has another number of rows than classes are given,
            two classes have one name, or not a single class is known.
    """
    given = {plain_name(name): row for row, name in enumerate(classes.given) if name}
    if len(given) != sum(map(bool, classes.given)):
        raise CheckpointError("two classes of the weights have one name")
    rows = {i: given.get(plain_name(name)) for i, name in enumerate(classes.wanted)}
    pairs = [(new, old) for new, old in rows.items() if old is not None]
    if not pairs:
        raise CheckpointError(
            f"no class of the model ({', '.join(classes.wanted[:5])}, ...) is among those of the "
            f"weights ({', '.join(filter(None, classes.given[:5]))}, ...); to start all classes "
            "afresh, leave them out by patterns (`skip`, train.init_skip)"
        )
    targets, sources = (list(numbers) for numbers in zip(*pairs, strict=True))
    result = dict(weights)
    for name in sorted(weights.keys() & wanted.keys()):  # the same order in all processes
        if any(part in name for part in _OF_CLASSES):
            _check_rows(name, weights[name], len(classes.given))
            mine = wanted[name]
            result[name] = getattr(mine, "full_tensor", mine.clone)()  # of a sharded model
            result[name][targets] = weights[name][sources].to(result[name])
    _report(classes, dict(pairs))
    return result


def plain_name(name: str) -> str:
    """A class's name without what people write differently."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _check_rows(name: str, tensor: Tensor, count: int) -> None:
    if len(tensor) != count:
        raise CheckpointError(f"{name} has rows of {len(tensor)} classes, but {count} are named")


def _report(classes: ClassNames, pairs: Mapping[int, int]) -> None:
    used = set(pairs.values())
    lists = {
        "kept": [classes.wanted[new] for new in pairs],
        "initialised": [name for i, name in enumerate(classes.wanted) if i not in pairs],
        "dropped": [n for row, n in enumerate(classes.given) if n and row not in used],
    }
    for kind, names in lists.items():
        logger.info("Classes %s: %d %s", kind, len(names), f"({', '.join(names)})" * bool(names))
