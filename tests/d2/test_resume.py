"""A run that resumes is the run that never stopped."""

import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from shapes_run import make_config, make_data

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]

STEPS = 6
PERIOD = ["train.checkpointer.period=1", "train.checkpointer.max_to_keep=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), num_images=5)


def run(out, data, *more, resume=False, steps=STEPS, evaluate=False):
    """Train, by default without evaluation. The config's seed decides, not the generators."""
    from dino_d2.d2 import train

    random.seed()
    np.random.seed(None)
    cfg = make_config(out, data, steps, *PERIOD, *more)
    if not evaluate:
        del cfg.dataloader.evaluator
    torch.manual_seed(1)  # of the weights at the start
    train(cfg, resume)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output directory of a run that nothing has stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    run(out, data, "dataloader.train.sampler=" + sampler())
    torch.set_num_threads(threads)
    return out


def sampler():
    """With a seed of its own: the default's comes from NumPy's generator, see `default_setup`."""
    return "{_target_:detectron2.data.samplers.TrainingSampler,size:5,seed:3}"


def load(path):
    return torch.load(path, weights_only=True)


def cut(whole, out, iteration):
    """The output directory as a run has it that is killed after a step."""
    out.mkdir()
    for file in whole.glob(f"model_{iteration:07d}.pth*"):
        shutil.copy(file, out)
    return out


def assert_same(actual, expected):
    """All that decides how training goes on."""
    actual, expected = load(actual), load(expected)
    for state in (actual, expected):
        state.pop("run_start")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("iteration", [0, 2, 3])
def test_resumed_training_is_bit_equal(whole, data, tmp_path, iteration, workers):
    out = cut(whole, tmp_path / "out", iteration)
    settings = [f"dataloader.train.num_workers={workers}", "dataloader.train.sampler=" + sampler()]
    run(out, data, *settings, resume=True)
    assert_same(out / "model_final.pth", whole / "model_final.pth")


def test_without_its_position_training_would_differ(whole, data, tmp_path, monkeypatch):
    """The test above can fail."""
    import dino_d2.d2.trainer as module

    monkeypatch.setattr(module, "start_at", lambda loader, batch, seed: None)
    out = cut(whole, tmp_path / "out", 2)
    run(out, data, "dataloader.train.sampler=" + sampler(), resume=True)
    with pytest.raises(AssertionError, match="not equal"):
        assert_same(out / "model_final.pth", whole / "model_final.pth")


def test_a_run_without_a_seed_keeps_the_one_it_drew(data, tmp_path):
    settings = ["train.seed=-1", "dataloader.train.sampler=" + sampler()]
    run(tmp_path / "a", data, *settings, steps=3)
    out = cut(tmp_path / "a", tmp_path / "b", 0)
    run(out, data, *settings, resume=True, steps=3)
    assert_same(out / "model_final.pth", tmp_path / "a" / "model_final.pth")


def test_averaged_weights_and_accumulated_gradients_resume(data, tmp_path):
    settings = [
        "train.ema.decay=0.3",
        "train.accumulate=2",
        "dataloader.train.sampler=" + sampler(),
    ]
    run(tmp_path / "a", data, *settings)
    out = cut(tmp_path / "a", tmp_path / "b", 2)
    run(out, data, *settings, resume=True)
    for name in ("model_final.pth", "model_final_ema.pth"):
        assert_same(out / name, tmp_path / "a" / name)
    average = load(out / "model_final.pth")["trainer"]["hooks"]["EMAHook"]
    assert average.keys() == load(out / "model_final.pth")["model"].keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["run_step", "after_step", "evaluation"])
def test_a_signal_saves_the_step_and_ends(whole, data, tmp_path, monkeypatch, number, place):
    """In the third step, in the hooks after it, and in the evaluation that is one of them."""
    from dino_d2.d2 import Trainer
    from dino_d2.d2.evaluation import CheckedEvaluator

    owner = CheckedEvaluator if place == "evaluation" else Trainer
    name = "process" if place == "evaluation" else place
    method, calls = getattr(owner, name), []
    before = signal.getsignal(number)  # ignored, where the tests run in the background

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == (1 if place == "evaluation" else 3):
            os.kill(os.getpid(), number)
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, interrupted)
    settings = ["train.eval_period=3", "dataloader.train.sampler=" + sampler()]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, data, *settings, evaluate=True)
    assert ended.value.code == 128 + number
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert_same(tmp_path / "model_0000002.pth", whole / "model_0000002.pth")
    assert signal.getsignal(number) == before


def test_a_signal_in_the_last_evaluation_costs_no_more(whole, data, tmp_path, monkeypatch):
    """It comes when the last step is over, and its checkpoint written."""
    from dino_d2.d2.evaluation import CheckedEvaluator

    process = CheckedEvaluator.process

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        process(self, *arguments)

    settings = ["dataloader.train.sampler=" + sampler()]
    monkeypatch.setattr(CheckedEvaluator, "process", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path, data, *settings, evaluate=True)
    monkeypatch.undo()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert_same(tmp_path / "model_0000005.pth", whole / "model_0000005.pth")
    run(tmp_path, data, *settings, evaluate=True, resume=True)
    assert_same(tmp_path / "model_final.pth", whole / "model_final.pth")
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text()


def test_a_signal_may_come_as_early_as_in_the_second_step(data, tmp_path, monkeypatch):
    from dino_d2.d2 import Trainer

    method = Trainer.run_step

    def interrupted(self):
        if self.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        method(self)

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path, data)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_a_run_that_is_behind_its_end_is_named(data, tmp_path):
    run(tmp_path, data, steps=2)
    with pytest.raises(ValueError, match=r"is at step 2, but training is to end at 1"):
        run(tmp_path, data, resume=True, steps=1)


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_a_length_that_is_none_is_an_error(data, tmp_path, steps):
    with pytest.raises(ValueError, match=f"max_iter must be an integer above 0, not {steps}"):
        run(tmp_path, data, f"train.max_iter={steps}")
