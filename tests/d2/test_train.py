"""Training and evaluation from a config: within this process, and by `train_net.py`."""

import importlib
import json
import shutil

import pytest
import torch
from PIL import Image
from shapes_run import make_config, make_data, overrides, train_net

from dino_d2 import model_zoo

pytestmark = pytest.mark.detectron2

SHAPES = [name for name in model_zoo.list_configs() if name.endswith("_shapes")]
RELATIVES = [name for name in SHAPES if name != "dino/dino_shapes"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The output directory of a run of two steps by `train_net.py`."""
    out = tmp_path_factory.mktemp("run") / "out"
    train_net(*overrides(out, data, 2))
    return out


@pytest.fixture(autouse=True)
def _one_thread():
    """As the processes: the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(cfg):
    """With the config's seed, as `train_net.py` does."""
    from detectron2.utils.env import seed_all_rng

    from dino_d2.d2 import train

    seed_all_rng(cfg.train.seed)
    return train(cfg)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def detections(out):
    return json.loads((out / "inference" / "coco_instances_results.json").read_text())


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line for line in lines}


def test_a_run_leaves_checkpoints_logs_and_curves(trained):
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"
    assert (
        weights(trained / "model_0000001.pth").keys() == weights(trained / "model_final.pth").keys()
    )
    log = (trained / "log.txt").read_text()
    assert "Starting training from iteration 0" in log
    assert "After 1.0 of 1.0 epochs: mean loss" in log
    assert list(trained.glob("events.out.tfevents.*"))
    with Image.open(trained / "curves.png") as picture:
        assert picture.format == "PNG"


def test_a_run_logs_losses_of_every_step_and_the_evaluation(trained):
    lines = metrics(trained)
    for iteration in (0, 1):
        line = lines[iteration]
        losses = [value for name, value in line.items() if name.startswith("loss_")]
        assert line["total_loss"] == pytest.approx(sum(losses), rel=1e-4)
        assert line["lr"] == pytest.approx(1e-3)
        assert line["grad_norm"] > 0
    assert {"bbox/AP", "bbox/AP50", "bbox/APs"} <= lines[1].keys() | lines.get(2, {}).keys()


def test_the_saved_config_is_the_one_that_ran(trained, data):
    from detectron2.config import LazyConfig

    config = LazyConfig.load(str(trained / "config.yaml"))
    assert config.train.max_iter == 2
    assert config.model.detector.embed_dim == 32
    assert config.dataloader.test.dataset.names == data


def test_the_seed_decides_everything(trained, data, tmp_path):
    train(make_config(tmp_path, data, 2))
    expected = weights(trained / "model_final.pth")
    for name, tensor in weights(tmp_path / "model_final.pth").items():
        assert torch.equal(tensor, expected[name]), name


def test_evaluating_a_checkpoint_finds_what_training_did(trained, data, tmp_path):
    checkpoint = f"train.init_checkpoint={trained}/model_final.pth"
    done = train_net("--eval-only", *overrides(tmp_path, data, 2, checkpoint))
    assert "copypaste: AP,AP50" in done.stdout
    assert detections(tmp_path) == detections(trained)
    assert not (tmp_path / "model_final.pth").exists()


def test_resuming_goes_on_where_the_run_ended(trained, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    done = train_net("--resume", *overrides(out, data, 4))
    assert "Starting training from iteration 2" in done.stdout
    state = torch.load(out / "model_final.pth", weights_only=True)
    assert state["iteration"] == state["trainer"]["iteration"] == 3
    steps = {float(entry["step"]) for entry in state["trainer"]["optimizer"]["state"].values()}
    assert steps == {4}
    assert sorted(metrics(out))[:4] == [0, 1, 2, 3]


def test_training_returns_the_results_of_its_evaluation(data, tmp_path):
    results = train(make_config(tmp_path, data, 1))
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= results["bbox"].keys()


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_train(name, data, tmp_path):
    results = train(make_config(tmp_path, data, 1, name=name))
    assert "AP" in results["bbox"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "model_final.pth").values())


def test_layers_run_as_the_config_says(data, tmp_path, monkeypatch):
    """Compiled (here by no more than tracing) and recomputed, with the same result."""
    compiled, calls = torch.compile, []

    def traced(function, dynamic, backend):
        calls.append(function)
        return compiled(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    for name, *settings in (("a",), ("b", "train.compile=True", "train.recompute=True")):
        cfg = make_config(tmp_path / name, data, 1, *settings)
        del cfg.dataloader.evaluator
        train(cfg)
    assert len(calls) == len(set(calls)) == 1 + 2  # layers of encoder and decoder
    final = [weights(tmp_path / name / "model_final.pth") for name in "ab"]
    torch.testing.assert_close(final[1], final[0])


def test_training_works_without_an_evaluator(data, tmp_path):
    cfg = make_config(tmp_path, data, 1)
    del cfg.dataloader.evaluator
    assert train(cfg) == {}


def test_training_starts_from_a_checkpoint(trained, data, tmp_path):
    checkpoint = f"train.init_checkpoint={trained}/model_final.pth"
    train(make_config(tmp_path, data, 1, checkpoint, "optimizer.lr=0"))
    expected = weights(trained / "model_final.pth")
    for name, tensor in weights(tmp_path / "model_final.pth").items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, expected[name])


def test_training_starts_from_a_checkpoint_of_other_classes(trained, data, tmp_path):
    """The detector of three classes becomes one whose class head starts afresh."""
    from detectron2.config import instantiate

    from dino_d2.d2 import Checkpointer

    checkpoint = f"{trained}/model_final.pth"
    cfg = make_config(tmp_path, data, 1, "model.detector.num_classes=5")
    model = instantiate(cfg.model)
    head = model.detector.heads.class_heads[0].weight.clone()
    skip = ["*class_head*", "*label_embed*"]
    Checkpointer(model, str(tmp_path), skip=skip).resume_or_load(checkpoint, resume=True)
    assert torch.equal(model.detector.heads.class_heads[0].weight, head)
    name = "detector.encoder.level_embed"
    assert torch.equal(model.state_dict()[name], weights(checkpoint)[name])


def test_the_config_says_what_not_to_load(trained, data, tmp_path):
    settings = [f"train.init_checkpoint={trained}/model_final.pth", "optimizer.lr=0"]
    settings.append("train.init_skip=['*level_embed']")
    train(make_config(tmp_path, data, 1, *settings))
    before, after = weights(trained / "model_final.pth"), weights(tmp_path / "model_final.pth")
    changed = [n for n in before if "encoder" in n and not torch.equal(before[n], after[n])]
    assert changed == ["detector.encoder.level_embed"]


def test_a_checkpoint_of_another_model_is_an_error(trained, data, tmp_path):
    checkpoint = f"train.init_checkpoint={trained}/model_final.pth"
    cfg = make_config(tmp_path, data, 1, checkpoint, "model.detector.num_levels=2")
    with pytest.raises(RuntimeError, match=r"do not fit the model(.|\n)*detector\.neck"):
        train(cfg)


def test_evaluation_needs_a_checkpoint(data, tmp_path):
    from dino_d2.d2 import evaluate_checkpoint

    with pytest.raises(ValueError, match=r"set train\.init_checkpoint"):
        evaluate_checkpoint(make_config(tmp_path, data, 1))


@pytest.fixture
def dtypes(monkeypatch):
    """The dtypes that convolutions and linear layers of the next models return."""
    module, seen = importlib.import_module("dino_d2.d2.train"), set()
    build = module.build_model

    def build_and_watch(cfg):
        model = build(cfg)
        for part in (model.detector.backbone, model.detector.encoder, model.detector.decoder):
            for layer in part.modules():
                if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                    layer.register_forward_hook(lambda *args: seen.add(args[-1].dtype))
        return model

    monkeypatch.setattr(module, "build_model", build_and_watch)
    return seen


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_reaches_training_and_evaluation(data, tmp_path, dtypes, precision):
    amp = ["train.amp.enabled=true", f"train.amp.dtype={precision}"]
    results = train(make_config(tmp_path, data, 2, *amp))
    assert dtypes == {getattr(torch, precision)}
    assert "AP" in results["bbox"]
    saved = weights(tmp_path / "model_final.pth").values()
    assert {tensor.dtype for tensor in saved if tensor.is_floating_point()} == {torch.float32}


def test_without_mixed_precision_everything_is_single(data, tmp_path, dtypes):
    train(make_config(tmp_path, data, 1))
    assert dtypes == {torch.float32}


def test_the_configs_clipping_is_applied(data, tmp_path):
    """A step of plain gradient descent is as long as the clipped gradient."""
    from detectron2.utils.env import seed_all_rng

    settings = ["train.clip_grad.max_norm=0.01", "optimizer.lr=1", "optimizer.weight_decay=0"]
    cfg = make_config(tmp_path, data, 1, *settings)
    cfg.optimizer._target_ = torch.optim.SGD
    module = importlib.import_module("dino_d2.d2.train")
    seed_all_rng(cfg.train.seed)
    before = {n: p.detach() for n, p in module.build_model(cfg).named_parameters()}
    train(cfg)
    after = weights(tmp_path / "model_final.pth")
    change = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    assert metrics(tmp_path)[0]["grad_norm"] > 1
    assert change == pytest.approx(0.01, rel=1e-3)


def test_data_without_any_object_trains(tmp_path):
    data = make_data(tmp_path, num_images=1)
    train(make_config(tmp_path / "out", data, 2))
    for name, tensor in weights(tmp_path / "out" / "model_final.pth").items():
        assert tensor.isfinite().all(), name
    assert metrics(tmp_path / "out")[1]["loss_bbox"] == 0


@pytest.mark.parametrize(
    "setting", ["model.detector.num_classes=5", "model.detector.num_classes=2"]
)
def test_a_wrong_number_of_classes_stops_before_training(data, tmp_path, setting):
    with pytest.raises(ValueError, match=r"set model\.detector\.num_classes=3"):
        train(make_config(tmp_path, data, 1, setting))
    assert not list(tmp_path.glob("*.pth"))


def test_a_misspelt_override_ends_before_anything_is_written(data, tmp_path):
    out = tmp_path / "out"
    done = train_net(*overrides(out, data, 1, "train.max_itr=3"), check=False)
    assert done.returncode != 0
    assert "did you mean 'max_iter'?" in done.stderr.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("nest", ["model", "state_dict", None])
def test_checkpoints_of_any_form_load(trained, data, tmp_path, nest):
    from detectron2.config import instantiate

    from dino_d2.d2 import Checkpointer

    state = weights(trained / "model_final.pth")
    torch.save({nest: state} if nest else state, tmp_path / "weights.pth")
    model = instantiate(make_config(tmp_path, data, 1).model)
    Checkpointer(model).load(str(tmp_path / "weights.pth"))
    name = "detector.encoder.level_embed"
    assert torch.equal(model.state_dict()[name], state[name])
