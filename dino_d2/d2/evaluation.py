"""Evaluation that refuses what would make its figures meaningless."""

from collections import Counter
from collections.abc import Iterable, Iterator

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from .loading import deadline, watch_workers
from .stopping import Stopped, StopSignals


class EvaluationError(RuntimeError):
    """The detections are not those of a model on every image once."""


def evaluate_checked(
    model: nn.Module,
    loader: DataLoader,
    evaluator: DatasetEvaluator | list[DatasetEvaluator],
    timeout: float,
) -> dict:
    """The evaluator's results on every image of a loader. The signals that are active end it.

    Args:
        timeout: seconds for a batch.

    Raises:
        EvaluationError, Stopped: see `CheckedEvaluator`.
        LoadingError: a batch has not come in time.
    """
    if isinstance(evaluator, list):
        evaluator = DatasetEvaluators(evaluator)
    signals = StopSignals.active or StopSignals()
    batches = UntilStopped(watch_workers(loader, timeout), signals, timeout)
    checked = CheckedEvaluator(evaluator, len(loader.dataset), signals)
    return inference_on_dataset(model, batches, checked)


class CheckedEvaluator(DatasetEvaluator):
    """An evaluator that checks what it is given.

    Args:
        evaluator: the one that computes the results.
        num_images: of the data set, over all processes.
        signals: end the evaluation, in all processes, when one comes.

    Raises:
        EvaluationError: a score or box is not finite, or an image came twice or not at all.
        Stopped: there was a signal.
    """

    def __init__(self, evaluator: DatasetEvaluator, num_images: int, signals: StopSignals):
        self.evaluator, self.num_images, self.signals = evaluator, num_images, signals
        self.images: list = []

    def reset(self) -> None:
        """Forget all images."""
        self.images = []
        self.evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Check detections and pass them on."""
        for source, output in zip(inputs, outputs, strict=True):
            found = output["instances"]
            for name, values in (("score", found.scores), ("box", found.pred_boxes.tensor)):
                if not values.isfinite().all():
                    raise EvaluationError(
                        f"a {name} is not finite: {source.get('file_name', 'unknown')}, "
                        f"id {source['image_id']}"
                    )
        self.images += [source["image_id"] for source in inputs]
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> dict | None:
        """The evaluator's results, if every image came once."""
        numbers = comm.all_gather(self.signals.number)
        if any(numbers):
            raise Stopped(max(numbers))
        seen = Counter(image for images in comm.all_gather(self.images) for image in images)
        twice = [image for image, count in seen.items() if count > 1]
        if twice:
            raise EvaluationError(f"{len(twice)} images were evaluated twice, as id {twice[0]!r}")
        if len(seen) != self.num_images:
            raise EvaluationError(
                f"{len(seen)} images were evaluated, the data set has {self.num_images}"
            )
        return self.evaluator.evaluate()


class UntilStopped:
    """A loader that ends early when a signal comes, and fails when a batch takes too long."""

    def __init__(self, loader: Iterable, signals: StopSignals, timeout: float = 0):
        self.loader, self.signals, self.timeout = loader, signals, timeout

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches, end = iter(self.loader), object()
        while not self.signals.number:
            with deadline(self.timeout):
                batch = next(batches, end)
            if batch is end:
                return
            yield batch
