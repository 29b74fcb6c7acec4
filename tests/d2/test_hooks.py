"""The instability of the matching, measured while a model trains."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2_inputs import make_input, tiny_model
from shapes_run import make_config, make_data

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def matchings(monkeypatch):
    """What every model's matching found, in turn."""
    from dino_d2.d2 import DetrMetaArch

    found, match = [], DetrMetaArch.match

    def record(model, batch):
        assert not model.training
        found.append(match(model, batch))
        return found[-1]

    monkeypatch.setattr(DetrMetaArch, "match", record)
    return found


def test_a_run_logs_the_instability(tmp_path, matchings):
    """Of three steps, on four images, the first of them without objects."""
    from dino_d2.d2 import train

    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    cfg = make_config(out, data, 3, "train.instability_period=1", "optimizer.lr=0.01")
    del cfg.dataloader.evaluator
    train(cfg)
    assert len(matchings) == 3 * 4
    assert (matchings[0] == -1).all()
    lines = (out / "metrics.json").read_text().splitlines()
    logged = {
        x["iteration"]: x["instability"] for x in map(json.loads, lines) if "instability" in x
    }
    by_hand = {}
    for step in (1, 2):
        before, after = matchings[4 * step - 4 : 4 * step], matchings[4 * step : 4 * step + 4]
        changed = sum((a != b).sum() for a, b in zip(before, after, strict=True))
        by_hand[step] = changed / 4
    assert logged == pytest.approx(by_hand)
    assert max(by_hand.values()) > 0


def test_a_resumed_run_goes_on(tmp_path):
    """Its first matching compares with the last one before."""
    from dino_d2.d2 import train

    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    for steps in (1, 2):
        cfg = make_config(out, data, steps, "train.instability_period=1")
        del cfg.dataloader.evaluator
        train(cfg, resume=True)
    lines = map(json.loads, (out / "metrics.json").read_text().splitlines())
    assert [line["iteration"] for line in lines if "instability" in line] == [1]


def make_hook(period, loader, max_iter=100, precision="float32"):
    from detectron2.utils.events import EventStorage

    from dino_d2.d2.hooks import InstabilityHook

    hook = InstabilityHook(period, SimpleNamespace(module=tiny_model()), loader, precision)
    hook.trainer = SimpleNamespace(iter=0, max_iter=max_iter, storage=EventStorage())
    return hook


def after_step(hook, iteration):
    hook.trainer.iter = hook.trainer.storage.iter = iteration
    hook.after_step()
    return hook.trainer.storage.latest().get("instability")


@pytest.mark.parametrize(
    ("period", "expected"), [(3, [2, 5, 6]), (1, list(range(7))), (7, [6]), (0, [6])]
)
def test_it_runs_every_period_and_at_the_end(period, expected, matchings):
    hook = make_hook(period, [[make_input()]], max_iter=7)
    measured = []
    for iteration in range(7):
        count = len(matchings)
        after_step(hook, iteration)
        measured += [iteration] * (len(matchings) - count)
    assert measured == expected


def test_the_model_goes_on_training_as_it_was():
    hook = make_hook(1, [[make_input()]])
    before = {name: tensor.clone() for name, tensor in hook.model.state_dict().items()}
    after_step(hook, 0)
    assert all(module.training for module in hook.model.modules())
    assert all(parameter.grad is None for parameter in hook.model.parameters())
    torch.testing.assert_close(dict(hook.model.state_dict()), before, rtol=0, atol=0)
    hook.model.eval()
    after_step(hook, 1)
    assert not any(module.training for module in hook.model.modules())


def test_training_draws_the_same_random_numbers():
    hook = make_hook(1, torch.utils.data.DataLoader([[make_input()]], None))
    before = torch.get_rng_state()
    after_step(hook, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", (False,)), ("bfloat16", (True, torch.bfloat16))]
)
def test_it_matches_in_the_precision_of_evaluation(monkeypatch, precision, expected):
    hook, seen = make_hook(1, [0], precision=precision), []

    def match(batch):
        seen.extend([torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")])
        return np.array([[0]])

    monkeypatch.setattr(hook.model, "match", match)
    after_step(hook, 0)
    assert tuple(seen[: len(expected)]) == expected


def test_a_state_is_that_of_the_last_matching(monkeypatch):
    first, second = make_hook(1, [0]), make_hook(1, [0])
    assert first.state_dict() == {}
    monkeypatch.setattr(first.model, "match", lambda batch: np.array([[0, -1], [-1, -1]]))
    monkeypatch.setattr(second.model, "match", lambda batch: np.array([[-1, 0], [-1, -1]]))
    after_step(first, 0)
    second.load_state_dict(first.state_dict())
    assert after_step(second, 1) == (1, 1)


def test_images_count_the_same_whatever_their_batch(monkeypatch):
    """Nothing is logged the first time. Then one of three images has two changes."""
    hook = make_hook(1, [0, 1])
    found = [np.array([[0, -1, 1]]), np.array([[0, 1, -1]] * 2)]
    monkeypatch.setattr(hook.model, "match", lambda batch: found[batch])
    assert after_step(hook, 0) is None
    assert after_step(hook, 1) == (0, 1)
    found[0] = np.array([[1, -1, 0]])
    assert after_step(hook, 2) == (pytest.approx(2 / 3), 2)


def test_a_process_without_images_takes_part(monkeypatch):
    """Or the others would wait for it forever."""
    from dino_d2.d2 import hooks

    hook = make_hook(1, [])
    others = [np.array([0, -1]), np.array([-1, -1])]
    monkeypatch.setattr(hooks.comm, "all_gather", lambda own: [own, others])
    after_step(hook, 0)
    others[0] = np.array([-1, 0])
    assert after_step(hook, 1) == (1, 1)


def test_matching_of_detectron2s_inputs():
    inputs = [make_input(boxes=((8, 8, 40, 32), (50, 8, 60, 32))), make_input(48, 80, boxes=())]
    model = tiny_model().eval()
    matched = model.match(inputs)
    assert matched.shape == (2, 12)
    assert sorted(matched[0]) == [-1] * 10 + [0, 1]
    assert (matched[1] == -1).all()


def run_hook(hook, steps, start_iter=0, max_iter=10**6):
    """Steps of (iteration, scalars); the hook's trainer is a name space."""
    from detectron2.utils.events import EventStorage

    storage = EventStorage()
    hook.trainer = SimpleNamespace(
        iter=0, start_iter=start_iter, max_iter=max_iter, storage=storage
    )
    hook.before_train()
    for iteration, scalars in steps:
        hook.trainer.iter = storage.iter = iteration
        storage.put_scalars(**scalars)
        hook.after_step()


def boxes(loss):
    return {"loss_class": 0.1, "loss_bbox": loss, "loss_bbox_enc": loss}


def test_training_that_never_sees_an_object_ends():
    from dino_d2.d2.hooks import NoObjectsHook

    seen = []
    steps = ((seen.append(i) or i, boxes(0.0)) for i in range(5, 100))
    with pytest.raises(
        RuntimeError, match=r"in 7 iterations, no object was matched.*check_dataset"
    ):
        run_hook(NoObjectsHook(7), steps, start_iter=5)
    assert seen == list(range(5, 12))


def test_one_object_is_enough():
    from dino_d2.d2.hooks import NoObjectsHook

    run_hook(NoObjectsHook(7), [(i, boxes(float(i == 3))) for i in range(30)])
    run_hook(NoObjectsHook(7), [(i, {"loss": 0.0}) for i in range(30)])  # has no such losses


class Saved(dict):
    """A checkpointer that keeps names and what was saved."""

    save_dir = ""

    def save(self, name, **more):
        self[name] = more


def evaluations(*values):
    """An evaluation every third step."""
    return [(i, {"bbox/AP": values[i // 3]} if i % 3 == 2 else {}) for i in range(3 * len(values))]


def test_the_best_evaluation_is_kept():
    from dino_d2.d2.hooks import BestCheckpointer

    saved = Saved()
    run_hook(BestCheckpointer(saved, "bbox/AP"), evaluations(20.0, 41.0, 31.0, float("nan")))
    assert saved == {"model_best": {"iteration": 5, "metrics": {"bbox/AP": 41.0}}}


def test_a_metric_that_nobody_finds_is_told(caplog):
    from dino_d2.d2.hooks import BestCheckpointer

    hook = BestCheckpointer(Saved(), "bbox/APP")
    run_hook(hook, evaluations(20.0, 41.0))
    hook.after_train()
    assert "no evaluation has found 'bbox/APP', only bbox/AP" in caplog.text
    caplog.clear()
    hook = BestCheckpointer(Saved(), "bbox/AP")
    run_hook(hook, [(0, {"lr": 1.0})])  # nothing was evaluated
    hook.after_train()
    assert caplog.text == ""


@pytest.mark.parametrize(("start", "kept"), [(7, 41.0), (0, 31.0)])
def test_a_run_that_resumes_knows_the_best(tmp_path, start, kept):
    from dino_d2.checkpoint.io import peek
    from dino_d2.d2 import Checkpointer
    from dino_d2.d2.hooks import BestCheckpointer

    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path), tag=False)
    run_hook(BestCheckpointer(checkpointer, "bbox/AP"), evaluations(20.0, 41.0))
    run_hook(BestCheckpointer(checkpointer, "bbox/AP"), evaluations(31.0), start_iter=start)
    assert peek(tmp_path / "model_best.pth")["metrics"] == {"bbox/AP": kept}


def test_a_run_that_resumes_keeps_no_more_checkpoints(tmp_path):
    from dino_d2.d2 import Checkpointer
    from dino_d2.d2.hooks import PeriodicCheckpointer

    for iterations in (range(3), range(3, 6)):
        checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
        hook = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=2)
        run_hook(hook, [(i, {}) for i in iterations], start_iter=iterations[0])
    kept = {file.name for file in tmp_path.glob("model_*.pth")}
    assert kept == {"model_0000004.pth", "model_0000005.pth"}


def test_epochs_are_logged_with_the_time_that_is_left(monkeypatch, caplog):
    """Of 10 images in steps of 4, each of which takes 50 seconds; the run resumes in step 1."""
    from dino_d2.d2 import hooks

    clock = itertools.count(1000, 100)
    monkeypatch.setattr(hooks.time, "monotonic", lambda: next(clock))
    losses = [0, 8.0, 4.0, 1.0, 2.0, 3.0]
    with caplog.at_level("INFO", "detectron2.dino_d2"):
        steps = [(i, {"total_loss": losses[i]}) for i in range(1, 6)]
        run_hook(hooks.EpochHook(10, 4), steps, start_iter=1, max_iter=6)
    assert [record.getMessage() for record in caplog.records] == [
        "After 1.2 of 2.4 epochs: mean loss 6.0000, 0:01:40 spent, 0:02:30 left",
        "After 2.0 of 2.4 epochs: mean loss 1.5000, 0:03:20 spent, 0:00:50 left",
        "After 2.4 of 2.4 epochs: mean loss 3.0000, 0:05:00 spent, 0:00:00 left",
    ]
