"""Which checkpoint training goes on from, and what none of them may hold."""

import shutil

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.detectron2


class Steps:
    """A trainer as far as checkpoints know it."""

    def __init__(self):
        self.iteration = None

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def make(folder, **settings):
    from dino_d2.d2 import Checkpointer

    return Checkpointer(nn.Linear(2, 3), str(folder), trainer=Steps(), **settings)


def save(folder, *iterations, checkpointer=None):
    checkpointer = checkpointer or make(folder)
    for iteration in iterations:
        checkpointer.checkpointables["trainer"].iteration = iteration
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def resume(folder):
    """The iteration that a new process goes on from."""
    checkpointer = make(folder)
    checkpointer.resume_or_load("", resume=True)
    return checkpointer.checkpointables["trainer"].iteration


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resuming_takes_the_newest(tmp_path):
    save(tmp_path, 5, 9)
    assert resume(tmp_path) == 9


@pytest.mark.parametrize(
    "tag", [None, "", "model_0000099.pth", "../../etc/passwd", "model_0000005.pth"]
)
def test_the_tag_may_be_lost_or_wrong(tmp_path, tag, caplog):
    save(tmp_path, 5, 9)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_text(tag)
    with caplog.at_level("INFO"):
        assert resume(tmp_path) == 9
    assert "is not the newest valid one" in caplog.text
    assert f"Resuming from {tmp_path}/model_0000009.pth" in caplog.text


def test_a_damaged_file_is_passed_over_and_named(tmp_path, caplog):
    save(tmp_path, 5, 9)
    damage(tmp_path / "model_0000009.pth")
    assert resume(tmp_path) == 5
    assert "Passed over: " in caplog.text
    assert "model_0000009.pth: damaged" in caplog.text


@pytest.mark.parametrize("loss", ["damaged", "deleted"])
def test_a_lost_run_does_not_start_from_the_beginning(tmp_path, loss):
    from dino_d2.checkpoint import CheckpointError

    save(tmp_path, 5)
    path = tmp_path / "model_0000005.pth"
    damage(path) if loss == "damaged" else path.unlink()
    with pytest.raises(
        CheckpointError, match=r"no valid checkpoint .*model_0000005\.pth.*--resume"
    ):
        resume(tmp_path)


def test_a_run_without_checkpoints_starts_and_says_so(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert resume(tmp_path) is None
    assert "has no checkpoint: training starts from the beginning" in caplog.text


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path):
    from dino_d2.d2 import Checkpointer

    save(tmp_path, 5)
    Checkpointer(nn.Linear(2, 3), str(tmp_path), tag=False).save("model_best", iteration=9)
    assert resume(tmp_path) == 5
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"


def test_a_new_run_in_an_old_directory_is_the_newer(tmp_path, caplog):
    """Whatever its steps are, and when files were copied."""
    save(tmp_path, 5, 9)
    second = make(tmp_path)
    second.resume_or_load("", resume=False)
    assert "has checkpoints of an earlier run, not resumed" in caplog.text
    save(tmp_path, 2, checkpointer=second)
    shutil.copy(tmp_path / "model_0000009.pth", tmp_path / "model_copy.pth")
    assert resume(tmp_path) == 2


def test_a_resumed_run_is_the_same_run(tmp_path):
    save(tmp_path, 5)
    resumed = make(tmp_path)
    resumed.resume_or_load("", resume=True)
    assert resumed.resumed
    save(tmp_path, 6, checkpointer=resumed)
    make(tmp_path)
    assert resume(tmp_path) == 6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    checkpointer = save(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    checkpointer.model.bias.data[1] = bad
    with pytest.raises(FloatingPointError, match="1 weights are not finite: bias"):
        save(tmp_path, 6, checkpointer=checkpointer)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight * torch.nan, "1 not finite:\n  weight"),
        (
            lambda weight: weight.to(torch.int8),
            r"1 not floating-point numbers:\n  weight: torch\.int8",
        ),
    ],
)
def test_weights_that_are_not_numbers_are_not_loaded(tmp_path, change, message):
    from dino_d2.checkpoint import CheckpointError

    model = nn.Linear(2, 3)
    state = {**model.state_dict(), "weight": change(model.weight.data)}
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path).load(str(tmp_path / "weights.pth"))


def test_a_process_that_cannot_see_the_checkpoint_is_an_error(tmp_path, monkeypatch):
    """Or it would train on with other moments of the gradient."""
    from dino_d2.checkpoint import CheckpointError
    from dino_d2.d2 import checkpoint

    save(tmp_path, 5)
    monkeypatch.setattr(
        checkpoint.comm, "all_gather", lambda mine: [mine, mine and mine is not True]
    )
    with pytest.raises(CheckpointError, match=r"processes \[1\] cannot read .*model_0000005\.pth"):
        resume(tmp_path)
