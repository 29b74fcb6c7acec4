"""A yacs project switched to DINO: the shipped yaml files, DefaultTrainer, our trainer."""

import copy
import json

import pytest
import torch
from shapes_run import make_data

from dino_d2 import model_zoo

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
