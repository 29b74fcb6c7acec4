"""Detectron2's checkpointer, with safe files and strict names."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys

from ..checkpoint import CheckpointError, ClassNames, load_weights
from ..checkpoint.io import find_weights, peek, read_content, replace_file, verify
from ..checkpoint.load import all_finite
from .sharding import gather, is_sharded

logger = logging.getLogger("detectron2.dino_d2")


class Checkpointer(DetectionCheckpointer):
    """Reads weights only, never code, and refuses weights that do not fit the model.

    Files are those that `read_weights` takes, with or without the trainer's state. They are
    written whole or not at all, with a checksum beside them, and hold finite weights only.

    Args:
        skip: patterns of names that are not loaded from a file to start from; when training
            resumes, everything is.
        tag: name the last file that was saved in `last_checkpoint`.

    Attributes:
        classes: names of classes, if those of a file to start from are not the model's.
        resumed: whether `resume_or_load` has found a checkpoint to go on from.
    """

    def __init__(
        self, model, save_dir: str = "", *, skip: Sequence[str] = (), tag: bool = True, **objects
    ):
        super().__init__(model, save_dir, **objects)
        self.skip, self.tag, self.resumed = skip, tag, False
        self.classes: ClassNames | None = None
        self.run_start = time.time()  # tells runs in one directory apart

    def save(self, name: str, **more) -> None:
        """Write `name`.pth with the model, all other objects and `more`; in process 0.

        All processes have to call it for a sharded model, whose file is that of a whole one.

        Raises:
            FloatingPointError: a weight is not finite. Nothing is written.
            CheckpointError: see `replace_file`.
        """
        if not self.save_dir or not (self.save_to_disk or is_sharded(self.model)):
            return
        things = {"model": self.model, **self.checkpointables}
        content = gather({key: thing.state_dict() for key, thing in things.items()})
        if not self.save_to_disk:
            return
        _refuse_non_finite(content["model"])
        content |= {"run_start": self.run_start, **more}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        replace_file(path, lambda file: torch.save(content, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write `last_checkpoint`, which Detectron2's tools read; resuming does not rely on it."""
        if self.tag:
            path, text = os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename
            replace_file(path, lambda file: file.write(text.encode()), checksum=False)

    def get_checkpoint_file(self) -> str:
        """The file that `last_checkpoint` names, always one of the directory; "" without a tag."""
        name = os.path.basename(super().get_checkpoint_file())
        return os.path.join(self.save_dir, name) if name else ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Load the newest valid checkpoint of the output directory, or `path` to start from.

        Raises:
            CheckpointError: to resume, but no checkpoint there is valid.
        """
        newest = self._agree(self.newest() if comm.is_main_process() else "") if resume else ""
        self.resumed = bool(newest)
        if newest:
            self.skip, self.classes = (), None
            content = self.load(newest)
            self.run_start = content.get("run_start", self.run_start)
            return content
        if resume:
            logger.info("%s has no checkpoint: training starts from the beginning", self.save_dir)
        elif self.save_dir and self._candidates()[0]:
            logger.warning("%s has checkpoints of an earlier run, not resumed", self.save_dir)
        return self.load(path, checkpointables=[])

    def newest(self) -> str:
        """The last checkpoint of the last run in the directory that is whole; "" if none was saved.

        Raises:
            CheckpointError: there is none, though there are damaged ones or there was one.
        """
        candidates, damaged = self._candidates()
        for path in candidates:
            try:
                verify(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            self._report(path, damaged)
            return str(path)
        tagged = self.get_checkpoint_file()
        if damaged or tagged:
            reason = "; ".join(damaged) or f"{tagged} is gone"
            raise CheckpointError(
                f"{self.save_dir} has no valid checkpoint to resume from: {reason}. To start from "
                "the beginning, leave out --resume or choose another train.output_dir."
            )
        return ""

    def _report(self, path: Path, damaged: list[str]) -> None:
        for reason in damaged:
            logger.warning("Passed over: %s", reason)
        tagged = self.get_checkpoint_file()
        if os.path.basename(tagged) != path.name:
            logger.warning("last_checkpoint names %r, which is not the newest valid one", tagged)
        logger.info("Resuming from %s", path)

    def _candidates(self) -> tuple[list[Path], list[str]]:
        """Checkpoints with the trainer's state, newest first, and what is wrong with the others."""
        found, damaged = [], []
        for path in Path(self.save_dir).glob("*.pth"):
            try:
                content = peek(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if "iteration" in content and content.keys() >= self.checkpointables.keys():
                found.append((content.get("run_start", 0), content["iteration"], path))
        return [path for *_, path in sorted(found, reverse=True)], damaged

    def _agree(self, path: str) -> str:
        """The main process's choice, which every process must be able to read."""
        path = comm.all_gather(path)[0]
        blind = [
            rank for rank, sees in enumerate(comm.all_gather(os.path.isfile(path))) if not sees
        ]
        if path and blind:
            raise CheckpointError(
                f"processes {blind} cannot read {path}: train.output_dir must be on a file system "
                "that all machines share"
            )
        return path

    def _load_file(self, filename: str) -> dict:
        content = read_content(filename)
        own = content if "model" in content else {}  # with the trainer's state
        return {**own, "model": find_weights(content)}

    def _load_model(self, checkpoint: dict) -> _IncompatibleKeys:
        load_weights(self.model, checkpoint.pop("model"), skip=self.skip, classes=self.classes)
        return _IncompatibleKeys([], [], [])


def _refuse_non_finite(weights: dict[str, torch.Tensor]) -> None:
    numbers = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if not numbers:
        return
    finite = torch.stack([all_finite(tensor) for tensor in numbers.values()]).tolist()
    bad = [name for name, good in zip(numbers, finite, strict=True) if not good]
    if bad:
        raise FloatingPointError(
            f"not saved, because {len(bad)} weights are not finite: {', '.join(bad[:5])}"
        )
