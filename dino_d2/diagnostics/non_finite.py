"""Finds the layer in which numbers stop being finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class NonFinite(NamedTuple):
    """Names of modules, in the order in which it happened."""

    outputs: list[str]  # not finite in the forward pass
    gradients: list[str]  # whose output has a gradient that is not


@contextmanager
def record_non_finite(model: nn.Module) -> Iterator[NonFinite]:
    """Note which of a model's parts give, or get back, what is not finite while this is active."""
    found = NonFinite([], [])

    def watch(name: str):
        def look(_module, _inputs, output) -> None:
            for tensor in _floats(output):
                _note(tensor, name, found.outputs)
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: _note(grad, name, found.gradients))

        return look

    handles = [part.register_forward_hook(watch(n)) for n, part in model.named_modules() if n]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(tensor: Tensor, name: str, names: list[str]) -> None:
    if name not in names and not tensor.isfinite().all():
        names.append(name)


def _floats(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _floats(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _floats(part)
