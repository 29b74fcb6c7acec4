"""Detectron2's checkpointer, with safe files and strict names."""

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys

from ..checkpoint import load_weights
from ..checkpoint.io import read_content


class Checkpointer(DetectionCheckpointer):
    """Reads weights only, never code, and refuses weights that do not fit the model.

    Files are those that `read_weights` takes, with or without the trainer's state.
    """

    def _load_file(self, filename: str) -> dict:
        content = read_content(filename)
        return content if "model" in content else {"model": content}

    def _load_model(self, checkpoint: dict) -> _IncompatibleKeys:
        load_weights(self.model, checkpoint.pop("model"))
        return _IncompatibleKeys([], [], [])
