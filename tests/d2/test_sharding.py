"""Training sharded over two processes, against the same with a copy of the model in each."""

import re
import shutil

import pytest
import torch
from figures import only_full
from jobs import environment
from shapes_run import make_config, make_data, overrides, train_net

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]

STEPS = 3
SETTINGS = [
    "optimizer.eps=0.001",  # AdamW blows up the rounding of gradients that are 0
    "train.ema.decay=0.9",
    "train.best_metric=ema/bbox/AP",
    "train.accumulate=2",
    "train.recompute=True",
    "train.checkpointer.period=1",
    "train.instability_period=2",
    "dataloader.train.total_batch_size=4",
    "dataloader.train.sampler={_target_:detectron2.data.samplers.TrainingSampler,size:3,seed:3}",
]


def run(out, data, *more):
    train_net("--num-gpus", "2", *overrides(out, data, STEPS, *SETTINGS, *more))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Of three images, so that one process evaluates more of them than the other."""
    return make_data(tmp_path_factory.mktemp("data"), num_images=3)


@pytest.fixture(scope="module")
def copied(data, tmp_path_factory):
    return run(tmp_path_factory.mktemp("copied") / "out", data)


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory):
    return run(tmp_path_factory.mktemp("sharded") / "out", data, "train.fsdp=True")


def load(path):
    content = torch.load(path, weights_only=True)
    content.pop("run_start", None)
    return content


def assert_same(actual, expected):
    """Everything in two checkpoints but what jumps with a rounding: AP, and the matching."""
    actual, expected = load(actual), load(expected)
    for state in (actual, expected):
        state.pop("metrics", None)
        state.get("trainer", {}).get("hooks", {}).pop("InstabilityHook", None)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["model_0000000", "model_final", "model_final_ema", "model_best"])
def test_checkpoints_are_whole_and_those_of_unsharded_training(copied, sharded, name):
    """Weights, moments of the optimizer, average: after one step, and after three."""
    assert_same(sharded / f"{name}.pth", copied / f"{name}.pth")


def test_each_process_has_half_of_the_weights(sharded):
    log = (sharded / "log.txt").read_text()
    own, total = map(int, re.search(r"Sharded: (\d+) of (\d+) weights", log).groups())
    assert total / 2 <= own < total / 2 * 1.05


def test_the_norm_of_gradients_is_that_of_all_parts(copied, sharded):
    norms = [
        [float(x) for x in re.findall(r'"grad_norm": ([\d.]+)', (out / "metrics.json").read_text())]
        for out in (copied, sharded)
    ]
    assert len(norms[0]) == STEPS
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_sharded_run_resumes_an_unsharded_one(copied, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for file in copied.glob("model_0000000.pth*"):
        shutil.copy(file, out)
    train_net(
        "--num-gpus", "2", "--resume", *overrides(out, data, STEPS, *SETTINGS, "train.fsdp=True")
    )
    assert "Resuming from" in (out / "log.txt").read_text()
    assert_same(out / "model_final.pth", copied / "model_final.pth")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        pytest.param(
            *("loss", "loss 'loss_class', first the gradient at the output of 'detector"),
            marks=[pytest.mark.faults, only_full],
        ),
        ("output", "first the output of 'detector.encoder'"),
        ("gradient", "the gradients of 1 weights, such as 'detector.encoder.level_embed'"),
    ],
)
def test_what_is_not_finite_ends_all_processes_and_is_named(data, tmp_path, what, reason):
    """Where, and with which images; found by all processes together."""
    done = train_net(
        "--num-gpus",
        "2",
        *overrides(tmp_path / "out", data, STEPS, "train.fsdp=True", "train.hang_timeout=20"),
        "model._target_=faulty.FaultyDINO",
        check=False,
        **environment(f"{what} 1 1"),
    )
    assert done.returncode == 1
    assert "not finite in iteration 1" in done.stderr
    assert f"Process 1: {reason}" in done.stderr, done.stderr
    assert (what == "gradient") == ("Process 0: " in done.stderr)  # it is the sum of both
    kept = {file.name for file in (tmp_path / "out").glob("non_finite_*")}
    assert "non_finite_0000001_process1.pt" in kept
    assert len(kept) == 1 + (what == "gradient")


def test_one_process_evaluates_what_two_have_trained(sharded, data, tmp_path):
    from dino_d2.d2 import evaluate_checkpoint

    start = f"train.init_checkpoint={sharded / 'model_final.pth'}"
    results = evaluate_checkpoint(make_config(tmp_path, data, 1, start, "train.fsdp=True"))
    assert results.keys() == {"bbox"}


def test_half_precision_with_a_scale_is_an_error(data, tmp_path):
    from dino_d2.d2 import train

    precision = ["train.amp.enabled=True", "train.amp.dtype=float16"]
    with pytest.raises(ValueError, match=r"train\.fsdp does not go with float16"):
        train(make_config(tmp_path, data, 1, "train.fsdp=True", *precision))
