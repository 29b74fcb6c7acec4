"""A yacs project switched to DINO: the shipped yaml files, DefaultTrainer, our trainer."""

import copy
import json
import logging
import os
import pickle
import signal

import pytest
import torch
from shapes_run import make_data

from dino_d2 import model_zoo
from dino_d2.checkpoint import CheckpointError

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]

NAMES = model_zoo.list_configs(".yaml")
TINY = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.DINO.NUM_QUERIES", 12,
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (),
        "TEST.EVAL_PERIOD", 2]  # fmt: skip


def load(name):
    from detectron2.config import get_cfg

    from dino_d2.d2 import add_dino_d2_config

    cfg = get_cfg()
    add_dino_d2_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(f"{name}.yaml"))
    return cfg


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """Trainers set them up."""
    logger = logging.getLogger("detectron2")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.level, logger.handlers = before


@pytest.fixture
def tiny(tmp_path):
    """The shipped DINO, small, on generated data under a registered name."""
    from dino_d2.d2.data import register_if_file

    data = register_if_file(make_data(tmp_path / "data"))
    cfg = load("dino/dino_r50_4scale_12ep")
    cfg.merge_from_list(TINY)
    cfg.MODEL.DINO.update({"NUM_CLASSES": 3, "EMBED_DIM": 32, "FFN_DIM": 48})
    cfg.MODEL.DINO.update({"ENCODER_LAYERS": 1, "DECODER_LAYERS": 2, "NUM_HEADS": 4})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (data,)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    return cfg


def test_every_yaml_has_a_name():
    assert NAMES == [
        "co_detr/co_dino_r50_5scale_12ep",
        "dino/dino_r50_4scale_12ep",
        "dn_detr/dn_deformable_detr_r50_50ep",
        "dn_detr/dn_detr_r50_50ep",
    ]
    with pytest.raises(KeyError, match=r"no config 'dino/x.yaml'; there are co_detr/co_dino"):
        model_zoo.get_config_file("dino/x.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_describes_what_the_lazy_config_does(name):
    from detectron2.config import instantiate
    from detectron2.modeling import META_ARCH_REGISTRY

    cfg, lazy = load(name), model_zoo.get_config(name)
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        wanted = instantiate(lazy.model)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, wanted)]
    assert shapes[0] == shapes[1]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in wanted.named_parameters() if p.requires_grad
    ]
    for attribute in ("num_detections", "input_format", "num_classes"):
        assert getattr(model, attribute) == getattr(wanted, attribute)
    detectors = model.detector, wanted.detector
    assert str(detectors[0]) == str(detectors[1])
    assert lazy.train.init_backbone == cfg.MODEL.WEIGHTS


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_has_the_recipe_of_the_lazy_config(name):
    from detectron2.config import instantiate

    cfg, lazy = load(name), model_zoo.get_config(name)
    solver = cfg.SOLVER
    assert lazy.train.max_iter == solver.MAX_ITER
    assert lazy.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
    assert lazy.optimizer.lr == solver.BASE_LR
    assert lazy.optimizer.weight_decay == solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM
    assert lazy.train.clip_grad.max_norm == solver.CLIP_GRADIENTS.CLIP_VALUE
    assert lazy.train.eval_period == cfg.TEST.EVAL_PERIOD == solver.CHECKPOINT_PERIOD
    multiplier = instantiate(lazy.lr_multiplier)
    (drop,) = solver.STEPS
    assert multiplier((drop - 1) / solver.MAX_ITER) == 1
    assert multiplier(drop / solver.MAX_ITER) == pytest.approx(0.1)
    assert lazy.train.output_dir == cfg.OUTPUT_DIR
    resize = lazy.dataloader.train.mapper.augmentations[2]
    assert tuple(resize.short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN
    assert resize.max_size == cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST


def test_an_existing_project_trains(tiny):
    """With its own DefaultTrainer, DatasetMapper and evaluator."""
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator

    class Existing(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    trainer = Existing(tiny)
    trainer.resume_or_load(resume=False)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer._last_eval_results["bbox"].keys() >= {"AP", "AP50"}
    name = "detector.heads.class_heads.0.bias"
    assert not torch.equal(trainer.model.state_dict()[name], before[name])


def test_our_trainer_has_the_recipe(tiny, tmp_path):
    from dino_d2.d2 import DetrTrainer

    trainer = DetrTrainer(tiny)
    trainer.resume_or_load(resume=False)
    optimizer = trainer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-5, 1e-4]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    norms = []
    optimizer.register_step_pre_hook(lambda chosen, *_: norms.append(total_norm(chosen)))
    trainer.train()
    assert norms == pytest.approx([0.1, 0.1], rel=1e-3)
    assert trainer._last_eval_results["bbox"].keys() >= {"AP", "AP50"}
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert lines
    assert (tmp_path / "out" / "model_final.pth").exists()
    images = [x["image_id"] for _ in range(4) for x in next(trainer._trainer._data_loader_iter)]
    assert 1 in images  # it has no objects


def total_norm(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    return torch.cat(gradients).norm().item()


def test_another_number_of_classes_is_refused(tiny):
    from dino_d2.d2 import DetrTrainer

    tiny.MODEL.DINO.NUM_CLASSES = 80
    with pytest.raises(ValueError, match=r"has 3 classes .*; set MODEL\.DINO\.NUM_CLASSES 3"):
        DetrTrainer(tiny)


def start(cfg, out, resume=False, **settings):
    """Our trainer, in a folder of its own."""
    from dino_d2.d2 import DetrTrainer

    torch.manual_seed(0)
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(out)
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    out.mkdir(exist_ok=True)
    trainer = DetrTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def run(*arguments, hook=None, **settings):
    """Train; returns the trainer."""
    trainer = start(*arguments, **settings)
    trainer.register_hooks([hook])
    trainer.train()
    return trainer


def at_the_end_of(step, action):
    from detectron2.engine import hooks

    return hooks.CallbackHook(after_step=lambda t: t.iter == step and action(t))


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


LONGER = {"SOLVER.MAX_ITER": 4, "SOLVER.EMA_DECAY": 0.9, "TEST.EVAL_PERIOD": 0, "DATASETS.TEST": ()}


def test_training_that_is_stopped_goes_on_as_if_it_had_not_been(tiny, tmp_path):
    from dino_d2.d2.stopping import Stopped

    tiny.merge_from_list([part for pair in LONGER.items() for part in pair])
    run(tiny, tmp_path / "whole", SEED=1)
    kill = at_the_end_of(1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):  # after the step that follows, as the hook comes last
        run(tiny, tmp_path / "stopped", hook=kill, SEED=1)
    assert sorted(x.name for x in (tmp_path / "stopped").glob("*.pth")) == ["model_0000002.pth"]
    trainer = run(tiny, tmp_path / "stopped", resume=True, SEED=1)
    assert trainer.start_iter == 3
    for name in ("model_final", "model_final_ema"):
        whole, stopped = (weights_of(tmp_path / x / f"{name}.pth") for x in ("whole", "stopped"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_a_signal_ends_an_evaluation(tiny, tmp_path, monkeypatch):
    """After the first of two steps; the checkpoint is that step's."""
    from dino_d2.d2.evaluation import CheckedEvaluator

    process = CheckedEvaluator.process

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        process(self, *arguments)

    monkeypatch.setattr(CheckedEvaluator, "process", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(tiny, tmp_path / "a", **{"TEST.EVAL_PERIOD": 1})
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "a" / "last_checkpoint").read_text() == "model_0000000.pth"


def test_an_evaluation_refuses_what_is_not_finite(tiny):
    from dino_d2.d2 import DetrTrainer
    from dino_d2.d2.evaluation import EvaluationError

    model = DetrTrainer.build_model(tiny)
    for parameter in model.detector.heads.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises((EvaluationError, FloatingPointError), match=r"finite"):
        DetrTrainer.test(tiny, model.eval())


def test_workers_leave_signals_to_the_trainer(tiny, tmp_path):
    trainer = start(tiny, tmp_path / "a", **{"DATALOADER.NUM_WORKERS": 1})
    loader = trainer._trainer.data_loader
    assert loader.timeout == trainer._trainer.data_timeout == 120
    assert loader.worker_init_fn is not None


def test_averages_parts_of_batches_and_the_best_weights(tiny, tmp_path):
    settings = {"SOLVER.EMA_DECAY": 0.9, "SOLVER.ACCUMULATE": 2, "TEST.BEST_METRIC": "ema/bbox/AP"}
    trainer = start(tiny, tmp_path / "out", **settings)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    trainer.train()
    assert sizes[:4] == [1, 1, 1, 1]
    final, average, best = (
        weights_of(tmp_path / "out" / f"{name}.pth")
        for name in ("model_final", "model_final_ema", "model_best")
    )
    name = "detector.heads.class_heads.0.bias"
    assert not torch.equal(final[name], average[name])
    assert torch.equal(best[name], average[name])
    lines = (tmp_path / "out" / "metrics.json").read_text()
    assert '"ema/bbox/AP"' in lines
    assert '"bbox/AP"' in lines


def test_a_weight_that_is_not_finite_ends_training_without_a_checkpoint(tiny, tmp_path):
    def ruin(trainer):
        next(trainer.model.parameters()).data.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="not finite in iteration 1"):
        run(tiny, tmp_path / "out", hook=at_the_end_of(0, ruin), **{"SOLVER.MAX_ITER": 3})
    assert list((tmp_path / "out").glob("model_*.pth")) == []


@pytest.fixture
def first(tiny, tmp_path):
    """Weights of a run."""
    return start(tiny, tmp_path / "first").model.state_dict()


def from_weights(cfg, out, weights, **settings):
    torch.save(weights, out.with_suffix(".pth"))
    return start(cfg, out, **{"MODEL.WEIGHTS": str(out.with_suffix(".pth")), **settings}).model


def test_weights_to_start_from_must_fit(tiny, tmp_path, first):
    other = {name: tensor + 1 for name, tensor in first.items()}
    prefix = "detector.backbone."
    bare = {n.removeprefix(prefix): t for n, t in other.items() if n.startswith(prefix)}
    for name, weights in (("whole", other), ("backbone", bare)):
        mine = from_weights(tiny, tmp_path / name, weights).state_dict()
        loaded = {key for key in first if torch.equal(mine[key], other[key])}
        assert loaded == {key for key in first if name == "whole" or key.startswith(prefix)}
    renamed = {name.replace("decoder", "recorder"): tensor for name, tensor in first.items()}
    with pytest.raises(CheckpointError, match=r"unexpected:\s+detector\.recorder"):
        from_weights(tiny, tmp_path / "renamed", renamed)


def test_a_backbone_has_no_classes_to_take_over(tiny, tmp_path, first):
    prefix = "detector.backbone."
    bare = {n.removeprefix(prefix): t for n, t in first.items() if n.startswith(prefix)}
    with pytest.raises(ValueError, match=r"WEIGHTS_SKIP have nothing to choose from"):
        from_weights(tiny, tmp_path / "a", bare, **{"MODEL.WEIGHTS_SKIP": ["*class*"]})


def test_classes_of_weights_are_taken_over_by_name(tiny, tmp_path, first):
    of_classes = [n for n in first if "class_head" in n or "label_embed" in n]
    others = {**first, **{n: first[n][:-1] + 1 for n in of_classes}}
    names = [{"id": i, "name": name} for i, name in enumerate(["circle", "dog"])]
    content = {"images": [], "annotations": [], "categories": names}
    (tmp_path / "two.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS_CLASSES"):
        from_weights(tiny, tmp_path / "a", others)
    classes = {"MODEL.WEIGHTS_CLASSES": str(tmp_path / "two.json")}
    mine = from_weights(tiny, tmp_path / "b", others, **classes).state_dict()
    name = "detector.heads.class_heads.0.bias"
    assert mine[name][0] == others[name][0]
    skipped = from_weights(tiny, tmp_path / "c", others, **{"MODEL.WEIGHTS_SKIP": of_classes})
    assert torch.equal(skipped.state_dict()[name], first[name])


def test_masks_are_told_to_have_no_effect(caplog, monkeypatch):
    from detectron2.modeling import META_ARCH_REGISTRY

    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    cfg = load(NAMES[1])
    cfg.MODEL.MASK_ON = True
    with torch.device("meta"):
        META_ARCH_REGISTRY.get("DINO")(cfg)
    assert "DINO finds boxes only: no effect of MODEL.MASK_ON" in caplog.text


def test_weights_of_caffe2_are_loaded_and_what_they_want_is_told(
    tiny, tmp_path, caplog, monkeypatch
):
    """As ImageNetPretrained/MSRA/R-50.pkl, with which most existing projects start."""
    from dino_d2.d2 import DetrTrainer

    tiny.MODEL.RESNETS.DEPTH, tiny.MODEL.RESNETS.RES2_OUT_CHANNELS = 50, 8
    trainer = DetrTrainer(tiny)
    backbone = trainer.model.detector.backbone
    kinds = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    weights = {"conv1_w": "stem.conv1.weight", "res_conv1_bn_s": "stem.conv1.norm.weight",
               "res_conv1_bn_b": "stem.conv1.norm.bias"}  # fmt: skip
    for name in backbone.state_dict():
        stage, block, kind, what = (*name.split(".", 3), "")[:4]
        ends = {"weight": "w", "norm.weight": "bn_s", "norm.bias": "bn_b"}
        if stage.startswith("res") and what in ends:
            weights[f"{stage}_{block}_{kinds[kind]}_{ends[what]}"] = name
    given = {theirs: torch.rand_like(backbone.state_dict()[n]) for theirs, n in weights.items()}
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    arrays["fc1000_w"] = arrays["conv1_b"] = arrays["res_conv1_bn_b"]
    path = tmp_path / "R-50.pkl"
    arrays["conv1_w_momentum"] = arrays["conv1_w"]
    path.write_bytes(pickle.dumps({"blobs": arrays}))
    tiny.MODEL.WEIGHTS = str(path)
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    trainer.resume_or_load(resume=False)
    assert "whose makers had {'INPUT.FORMAT': 'BGR'" in caplog.text
    loaded = backbone.state_dict()
    assert len(given) == 3 * 53
    for theirs, name in weights.items():
        torch.testing.assert_close(loaded[name], given[theirs], rtol=0, atol=0)
    del given["res4_5_branch2b_w"], arrays["res4_5_branch2b_w"]
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Caffe2"}))
    with pytest.raises(CheckpointError, match=r"res4\.5\.conv2\.weight"):
        trainer.resume_or_load(resume=False)
