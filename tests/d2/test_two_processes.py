"""Distributed training where one process's batches never have an object."""

import json
import os
from pathlib import Path

import pytest
import torch
from shapes_run import make_data, overrides, train_net

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output directory of three steps in two processes, with what each recorded."""
    folder = tmp_path_factory.mktemp("run")
    data = make_data(folder / "data", num_images=2)
    in_order = "{_target_:detectron2.data.samplers.TrainingSampler,size:2,shuffle:false}"
    more = [f"dataloader.train.sampler={in_order}", "model._target_=recording.RecordingDINO"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    arguments = overrides(folder / "out", data, 3, *more)
    train_net("--num-gpus", "2", *arguments, PYTHONPATH=path, RECORD_TO=str(folder))
    return folder


@pytest.fixture(scope="module")
def records(run):
    return [torch.load(run / f"{rank}.pth", weights_only=True) for rank in (0, 1)]


def test_one_process_never_saw_an_object(records):
    first, second = (record["objects"] for record in records)
    assert first == (0, 0, 0)
    assert len(second) == 3
    assert min(second) > 0


def test_both_processes_end_with_the_same_weights(records):
    first, second = (record["weights"] for record in records)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.isfinite().all(), name


def test_what_is_saved_is_what_was_evaluated(run, records):
    saved = torch.load(run / "out" / "model_final.pth", weights_only=True)["model"]
    for name, tensor in records[1]["weights"].items():
        assert torch.equal(tensor, saved[name]), name


def test_training_reached_all_weights(run):
    """Also those that only objects reach, such as the box heads."""
    saved = torch.load(run / "out" / "model_final.pth", weights_only=True)
    moments = saved["trainer"]["optimizer"]["state"].values()
    assert all(moment["exp_avg_sq"].any() for moment in moments)


def test_both_processes_took_part_in_the_evaluation(run):
    results = (run / "out" / "inference" / "coco_instances_results.json").read_text()
    assert {entry["image_id"] for entry in json.loads(results)} == {1, 2}
