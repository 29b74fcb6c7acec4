"""Batches for training: Detectron2's order, from any position, with any number of workers."""

import random

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.detectron2

IMAGES = [
    {"file_name": f"{i}.jpg", "image_id": i, "width": 10 + 5 * (i % 3 == 0), "height": 12}
    for i in range(11)
]


def draw(image):
    """As an augmentation: numbers of every generator that one may use."""
    if image["image_id"] == 99:
        raise OSError("truncated")
    return {**image, "drawn": (random.random(), np.random.rand(), torch.rand(1).item())}


def make(batch_size=3, start=0, seed=0, images=IMAGES, **settings):
    from detectron2.data.samplers import TrainingSampler

    from dino_d2.d2.loading import build_train_loader, start_at

    sampler = TrainingSampler(len(images), seed=5)
    loader = build_train_loader(images, draw, batch_size, sampler=sampler, **settings)
    start_at(loader, start, seed)
    return loader


def batches(loader, number=9):
    return [batch for batch, _ in zip(loader, range(number), strict=False)]


def ids(found):
    return [[image["image_id"] for image in batch] for batch in found]


@pytest.mark.parametrize("grouping", [True, False])
def test_the_order_is_detectron2s(grouping):
    from detectron2.data import build_detection_train_loader
    from detectron2.data.samplers import TrainingSampler

    theirs = build_detection_train_loader(
        IMAGES,
        mapper=draw,
        sampler=TrainingSampler(len(IMAGES), seed=5),
        total_batch_size=3,
        aspect_ratio_grouping=grouping,
    )
    ours = make(aspect_ratio_grouping=grouping)
    assert ids(batches(ours)) == ids(batches(theirs))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 4])
def test_position_and_seed_decide_everything(start, workers):
    expected = batches(make())
    random.seed(7)
    found = batches(make(start=start, num_workers=workers), 9 - start)
    assert found == expected[start:]


def test_images_and_rounds_draw_different_numbers():
    drawn = [image["drawn"] for batch in batches(make(), 20) for image in batch]
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & {x["drawn"] for batch in batches(make(seed=1), 20) for x in batch}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_loaded_is_named(workers):
    from dino_d2.d2.loading import LoadingError

    broken = {"file_name": "x.jpg", "image_id": 99, "width": 1, "height": 1}
    with pytest.raises(LoadingError, match=r"x\.jpg, id 99: OSError: truncated"):
        batches(make(1, images=[broken], num_workers=workers))


def test_a_batch_must_fit_the_processes(monkeypatch):
    from dino_d2.d2 import loading

    monkeypatch.setattr(loading.comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="3 cannot be divided by the number of processes, 2"):
        make(3)
    assert [len(batch) for batch in batches(make(4))] == [2] * 9


def test_a_silent_worker_is_an_error():
    import time

    from dino_d2.d2.loading import build_train_loader, no_workers_left, watch_workers

    loader = build_train_loader(IMAGES, lambda image: time.sleep(100), 1, num_workers=1)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"), no_workers_left():
        batches(watch_workers(loader, 0.5))
    assert time.monotonic() - start < 20


def test_a_file_that_never_ends_is_an_error():
    import time

    from dino_d2.d2.loading import LoadingError, deadline

    with pytest.raises(LoadingError, match=r"no data for 0\.2 seconds"), deadline(0.2):
        time.sleep(100)
    with deadline(0.2):
        pass
    time.sleep(0.3)  # nothing is left of it


def test_loaders_without_workers_are_left_alone():
    from dino_d2.d2.loading import watch_workers

    assert watch_workers(make(), 0.5).timeout == 0
    assert watch_workers([1], 0.5) == [1]
