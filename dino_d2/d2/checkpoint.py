"""Detectron2's checkpointer, with safe files and strict names."""

from collections.abc import Sequence

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys

from ..checkpoint import ClassNames, load_weights
from ..checkpoint.io import find_weights, read_content


class Checkpointer(DetectionCheckpointer):
    """Reads weights only, never code, and refuses weights that do not fit the model.

    Files are those that `read_weights` takes, with or without the trainer's state.

    Args:
        skip: patterns of names that are not loaded from a file to start from; when training
            resumes, everything is.

    Attributes:
        classes: names of classes, if those of a file to start from are not the model's.
    """

    def __init__(self, model, save_dir: str = "", *, skip: Sequence[str] = (), **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.skip = skip
        self.classes: ClassNames | None = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Load the last checkpoint of the output directory, or `path` to start from."""
        if resume and self.has_checkpoint():
            self.skip, self.classes = (), None
        return super().resume_or_load(path, resume=resume)

    def _load_file(self, filename: str) -> dict:
        content = read_content(filename)
        own = content if "model" in content else {}  # with the trainer's state
        return {**own, "model": find_weights(content)}

    def _load_model(self, checkpoint: dict) -> _IncompatibleKeys:
        load_weights(self.model, checkpoint.pop("model"), skip=self.skip, classes=self.classes)
        return _IncompatibleKeys([], [], [])
