"""Batches for training whose order and augmentation depend on nothing but seed and position."""

import itertools
import multiprocessing
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler


class LoadingError(RuntimeError):
    """An image cannot be loaded; the message names it."""


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and PyTorch; numbers of different keys have nothing in common."""
    python, numpy, pytorch = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)


class _Samples(Dataset):
    """Mapped images by ((seed, process, position), index); the first three seed what is random."""

    def __init__(self, dataset: list[dict], mapper: Callable):
        self.dataset = DatasetFromList(dataset, copy=False)
        self.mapped = MapDataset(self.dataset, mapper)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[tuple[int, int, int], int]) -> dict:
        key, index = place
        seed_all(*key)
        try:
            return self.mapped[index]
        except Exception as error:
            source = self.dataset[index]
            raise LoadingError(
                f"{source.get('file_name', 'unknown')}, id {source.get('image_id')}: "
                f"{type(error).__name__}: {error}"
            ) from error


class TrainingBatches(Sampler):
    """Endless batches of places in `_Samples`, from any position on.

    Args:
        sampler: endless indices for this process.
        groups: of every image; a batch holds images of one group.

    Attributes:
        seed, start: the key of all augmentation, and how many batches are left out at first. They
            count from the next iterator on.
    """

    def __init__(self, sampler: Iterable[int], batch_size: int, groups: Sequence[int]):
        self.sampler, self.batch_size, self.groups = sampler, batch_size, groups
        self.seed = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[tuple[int, int, int], int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[tuple[tuple[int, int, int], int]]]:
        buckets, rank = defaultdict(list), comm.get_rank()
        for position, index in enumerate(self.sampler):
            bucket = buckets[self.groups[index]]
            bucket.append(((self.seed, rank, position), index))
            if len(bucket) == self.batch_size:
                yield bucket.copy()
                bucket.clear()


def build_train_loader(
    dataset: list[dict],
    mapper: Callable,
    total_batch_size: int,
    num_workers: int = 0,
    sampler: Sampler | None = None,
    aspect_ratio_grouping: bool = True,
) -> DataLoader:
    """As Detectron2's `build_detection_train_loader`, but able to start anywhere: see `start_at`.

    Batches are the same for any number of workers.

    Args:
        dataset: Detectron2's dicts; "width" and "height" decide the grouping.
        mapper: makes an input of the model from a dict.
        total_batch_size: of all processes together.
        sampler: endless indices for this process; by default a `TrainingSampler`.
        aspect_ratio_grouping: wide and tall images come in separate batches.

    Raises:
        ValueError: the batch cannot be divided by the number of processes.
    """
    batch_size, rest = divmod(total_batch_size, comm.get_world_size())
    if rest or not batch_size:
        raise ValueError(
            f"a total batch size of {total_batch_size} cannot be divided by the number of "
            f"processes, {comm.get_world_size()}"
        )
    wide = [aspect_ratio_grouping and image["width"] > image["height"] for image in dataset]
    sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
    return DataLoader(
        _Samples(dataset, mapper),
        batch_sampler=TrainingBatches(sampler, batch_size, wide),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
    )


def start_at(loader: Iterable, batch: int, seed: int) -> None:
    """Let a loader of `build_train_loader` begin with a batch of that number; others stay as is."""
    if is_ours(loader):
        loader.batch_sampler.start, loader.batch_sampler.seed = batch, seed


def is_ours(loader: Iterable) -> bool:
    """Whether it comes from `build_train_loader`."""
    return isinstance(getattr(loader, "batch_sampler", None), TrainingBatches)


def watch_workers(loader: DataLoader, timeout: float) -> DataLoader:
    """Let a loader fail when its workers are silent for `timeout` seconds.

    The workers leave signals to the process that they work for.
    """
    if getattr(loader, "num_workers", 0):
        loader.timeout, loader.worker_init_fn = timeout, _ignore_signals
    return loader


def _ignore_signals(_worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise a LoadingError where the block still waits for data after that time; 0 is no limit.

    A loader's own timeout does not end a wait for the rest of what a frozen worker has begun to
    send, nor one in this process.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return

    def give_up(*_):
        raise LoadingError(f"no data for {seconds} seconds: a file or a data loader's worker hangs")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def no_workers_left() -> Iterator[None]:
    """At the end of the block, kill workers that it started and left behind.

    An error leaves them, and one that hangs would let this process wait for it forever.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        left = set(multiprocessing.active_children()) - before
        if left:
            _kill(left)


def _kill(processes: Iterable[multiprocessing.Process]) -> None:
    main = threading.current_thread() is threading.main_thread()
    handler = main and signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would complain
    for process in processes:
        process.kill()
        process.join()
    if main:
        signal.signal(signal.SIGCHLD, handler)
