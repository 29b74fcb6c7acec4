"""The average of the weights: its values, its evaluation, what is kept of it."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from shapes_run import make_config, make_data
from torch import nn

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), num_images=2)


def make_hook(decay=0.15):
    """Of a batch norm, which has floating-point and integer buffers."""
    from dino_d2.d2.ema import EMAHook

    model = nn.BatchNorm1d(1)
    hook = EMAHook(model, decay)
    hook.trainer = SimpleNamespace(iter=0)
    hook.before_train()
    return hook, model


def run(hook, model, *values):
    """Steps with these weights and running means."""
    for step, value in enumerate(values):
        hook.trainer.iter = step
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(-value)
        model.num_batches_tracked += 1
        hook.after_step()


def test_it_is_the_exponential_moving_average():
    """With decays of 2/11, 3/12 and then the smaller one that is given."""
    hook, model = make_hook(decay=0.2)
    run(hook, model, 2.0, 3.0, 5.0)
    expected = 1.0
    for decay, value in ((2 / 11, 2.0), (0.2, 3.0), (0.2, 5.0)):
        expected = decay * expected + (1 - decay) * value
    assert hook.average["weight"].item() == pytest.approx(expected)
    expected = 0.0
    for decay, value in ((2 / 11, -2.0), (0.2, -3.0), (0.2, -5.0)):
        expected = decay * expected + (1 - decay) * value
    assert hook.average["running_mean"].item() == pytest.approx(expected)
    assert hook.average["num_batches_tracked"] == 3


def test_the_model_has_it_for_a_while():
    """And gets its own weights back, also after an error."""
    hook, model = make_hook()
    run(hook, model, 2.0)
    with pytest.raises(ZeroDivisionError), hook.applied():
        1 / 0  # noqa: B018
    assert model.weight.item() == 2
    with hook.applied():
        assert model.weight.item() == pytest.approx(hook.average["weight"].item())
        assert model.weight.item() != 2
    assert model.weight.item() == 2
    assert model.running_mean.item() == -2


def test_it_goes_on_from_a_checkpoint():
    hook, model = make_hook()
    run(hook, model, 2.0)
    other, other_model = make_hook()
    other.load_state_dict(hook.state_dict())
    other.before_train()
    other_model.load_state_dict(model.state_dict())
    run(hook, model, 3.0)
    run(other, other_model, 3.0)
    assert torch.equal(hook.average["weight"], other.average["weight"])


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match=f"average must be .*{decay}"):
        make_hook(decay)


def test_a_run_evaluates_and_keeps_both(data, tmp_path, monkeypatch):
    """The averaged weights' AP is logged beside the other and decides on the best checkpoint."""
    module = importlib.import_module("dino_d2.d2.train")
    seen, evaluate = [], module.evaluate

    def watched(cfg, model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluate(cfg, model)

    monkeypatch.setattr(module, "evaluate", watched)
    settings = ["train.ema.decay=0.9", "train.best_metric=ema/bbox/AP", "optimizer.lr=0.01"]
    results = module.train(make_config(tmp_path, data, 2, *settings))
    assert results.keys() == {"ema", "bbox"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["ema/bbox/AP"] == results["ema"]["bbox"]["AP"]
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)
    average = whole["trainer"]["hooks"]["EMAHook"]
    assert any(not torch.equal(average[name], whole["model"][name]) for name in average)
    of_average, raw = seen
    for kept, expected in (
        (of_average, average),
        (raw, whole["model"]),
        (load(tmp_path / "model_final_ema.pth"), average),
        (load(tmp_path / "model_best.pth"), average),
    ):
        torch.testing.assert_close(kept, dict(expected), rtol=0, atol=0)


def load(path):
    return dict(torch.load(path, weights_only=True)["model"])


def test_a_best_average_needs_an_average(data, tmp_path):
    from dino_d2.d2 import train

    cfg = make_config(tmp_path, data, 1, "train.best_metric=ema/bbox/AP")
    with pytest.raises(ValueError, match=r"ema/bbox/AP. needs an average"):
        train(cfg)
