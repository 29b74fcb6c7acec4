"""Training in yacs pipelines: Detectron2's DefaultTrainer with what DETRs need."""

import logging
import weakref

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import print_csv_format
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import load_backbone, load_weights, read_weights
from .checkpoint import Checkpointer
from .data import check_num_classes, class_names, coco_evaluator, load_datasets
from .ema import EMAHook
from .evaluation import evaluate_checked
from .hooks import (
    NoObjectsHook,
    best_checkpointer,
    first_step,
    save_average,
    saved_when_stopped,
)
from .loading import build_train_loader, no_workers_left, watch_workers
from .mapper import CheckedMapper
from .solver import BackboneLR
from .stopping import StopSignals
from .trainer import Trainer

logger = logging.getLogger("detectron2.dino_d2")

WORKER_TIMEOUT = 120  # seconds for a batch


class DetrTrainer(DefaultTrainer):
    """`DefaultTrainer` with AdamW, gradients clipped as a whole, checked data, and the steps and
    checkpoints that `dino_d2.d2.train` has.

    SOLVER.CLIP_GRADIENTS.CLIP_VALUE limits the L2 norm of all gradients together. Data sets are
    names, or "annotations.json:image_folder"; crops and sizes are those of INPUT.

    Raises:
        FloatingPointError, LoadingError, Stopped: see `Trainer`.
        CheckpointError: see `resume_or_load`, and `Checkpointer`.
        EvaluationError: see `CheckedEvaluator`.
    """

    def __init__(self, cfg: CfgNode):
        super(DefaultTrainer, self).__init__()  # whose own makes another step
        if not logger.isEnabledFor(logging.INFO):  # without `default_setup`
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = Trainer(
            create_ddp_model(model, broadcast_buffers=False),
            watch_workers(self.build_train_loader(cfg), WORKER_TIMEOUT),
            optimizer,
            model.device.type,
            "float16" if cfg.SOLVER.AMP.ENABLED else "float32",
            seed=cfg.SEED if cfg.SEED >= 0 else None,
            save_dir=cfg.OUTPUT_DIR,
            data_timeout=WORKER_TIMEOUT,
            accumulate=cfg.SOLVER.ACCUMULATE,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        decay = cfg.SOLVER.EMA_DECAY
        self.ema = EMAHook(self.model, decay) if decay else None
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the newest valid checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS: a whole
        detector's, or the backbone's from ImageNet.

        Raises:
            CheckpointError: the weights do not fit, or no checkpoint is valid.
            ValueError: MODEL.WEIGHTS_CLASSES or WEIGHTS_SKIP is for weights of a backbone.
        """
        self.checkpointer.resume_or_load("", resume=resume)
        self.start_iter = first_step(self, self.checkpointer, self.max_iter)
        if not self.checkpointer.resumed and self.cfg.MODEL.WEIGHTS:
            self._load(self.cfg.MODEL.WEIGHTS)

    def _load(self, path: str) -> None:
        weights = read_weights(PathManager.get_local_path(path))
        model = getattr(self.model, "module", self.model)
        if any(name.startswith(("detector.", "backbone.")) for name in weights):
            given = self.cfg.MODEL.WEIGHTS_CLASSES
            classes = class_names(given, self.cfg.DATASETS.TRAIN) if given else None
            load_weights(model, weights, skip=self.cfg.MODEL.WEIGHTS_SKIP, classes=classes)
        elif self.cfg.MODEL.WEIGHTS_CLASSES or self.cfg.MODEL.WEIGHTS_SKIP:
            raise ValueError(
                f"MODEL.WEIGHTS {path} are a backbone's, in which MODEL.WEIGHTS_CLASSES and "
                "MODEL.WEIGHTS_SKIP have nothing to choose from"
            )
        else:
            backbone = model.detector.backbone
            if any(name in weights for name in ("conv1_w", "res2_0_branch2a_w")):
                weights = _from_caffe2(weights)
                _warn_of_other_pixels(self.cfg, path)
            load_backbone(getattr(backbone, "bottom_up", backbone), weights)  # of an FPN
        logger.info("Weights loaded from %s", path)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """`DefaultTrainer`'s, and those that average weights, keep the best and miss objects."""
        cfg, found = self.cfg, super().build_hooks()
        timers = [i for i, hook in enumerate(found) if isinstance(hook, hooks.IterationTimer)]
        for i in timers:  # what prints needs a time from the first step on
            found[i] = hooks.IterationTimer(warmup_iter=0)
        if self.ema is not None:
            (place,) = (i for i, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
            found.insert(place, hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._test_average))
        if comm.is_main_process():  # before what writes metrics
            metric, folder = cfg.TEST.BEST_METRIC, cfg.OUTPUT_DIR
            found.insert(-1, best_checkpointer(metric, self.model, folder, self.ema))
        return [NoObjectsHook(), self.ema, *found]

    def _test_average(self) -> dict:
        with self.ema.applied():
            return {"ema": self.test(self.cfg, self.model)}

    def train(self) -> dict | None:
        """As `DefaultTrainer`'s. SIGTERM and SIGINT end it after a step, with a checkpoint."""
        with StopSignals() as signals, no_workers_left():
            self._trainer.signals = signals
            with saved_when_stopped(self, self.checkpointer):
                results = super().train()
        if self.ema is not None:
            save_average(self.ema, self.cfg.OUTPUT_DIR)
        return results

    def before_train(self) -> None:
        """Let the data go on with the step."""
        inner = self._trainer
        inner.storage, inner.iter, inner.start_iter = self.storage, self.iter, self.start_iter
        inner.before_train()
        super().before_train()

    def after_step(self) -> None:
        """The hooks; then end if that was agreed."""
        super().after_step()
        self._trainer.after_step()

    def after_train(self) -> None:
        """The hooks; and let the data loader's workers go."""
        self._trainer.after_train()
        super().after_train()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; the backbone learns at a tenth of the rate."""
        solver = cfg.SOLVER
        parameters = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            lr_factor_func=BackboneLR(0.1),
        )
        optimizer = torch.optim.AdamW(parameters, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
        if solver.CLIP_GRADIENTS.ENABLED:
            limit = solver.CLIP_GRADIENTS.CLIP_VALUE
            optimizer.register_step_pre_hook(lambda chosen, *_: _clip(chosen, limit))
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Batches of checked data, augmented as INPUT says.

        Raises:
            DataError: see `load_datasets`.
            ValueError: the model has another number of classes than the data.
        """
        names = cfg.DATASETS.TRAIN
        dataset = load_datasets(names, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        node = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).yacs_name
        check_num_classes(names, cfg.MODEL[node].NUM_CLASSES, f"MODEL.{node}.NUM_CLASSES ")
        settings = build_detection_train_loader.from_config(
            cfg, dataset=dataset, mapper=_mapper(cfg, True)
        )
        return build_train_loader(**settings)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """One image at a time."""
        return build_detection_test_loader(
            load_datasets(dataset_name),
            mapper=_mapper(cfg, False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list | None = None) -> dict:
        """As `DefaultTrainer`'s, with every detection checked; a signal to stop ends it."""
        names, results = cfg.DATASETS.TEST, {}
        evaluators = evaluators or [cls.build_evaluator(cfg, name) for name in names]
        for name, evaluator in zip(names, evaluators, strict=True):
            loader = cls.build_test_loader(cfg, name)
            results[name] = evaluate_checked(model, loader, evaluator, WORKER_TIMEOUT)
            if comm.is_main_process():
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        """COCO's average precision of boxes."""
        return coco_evaluator(dataset_name, cfg.OUTPUT_DIR)


def _from_caffe2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a ResNet with Detectron2's names, and with the statistics that Caffe2 left out
    after it had made them part of the weights.
    """
    own = {name: tensor for name, tensor in weights.items() if not name.endswith("_momentum")}
    named, _ = convert_c2_detectron_names(own)
    unused = ("fc1000.weight", "fc1000.bias", "stem.conv1.bias")
    result = {name: tensor for name, tensor in named.items() if name not in unused}
    for name, tensor in named.items():
        if name.endswith("norm.weight"):
            norm = name.removesuffix("weight")
            result.setdefault(norm + "running_mean", torch.zeros_like(tensor))
            result.setdefault(norm + "running_var", torch.ones_like(tensor))
    return result


def _warn_of_other_pixels(cfg: CfgNode, path: str) -> None:
    wanted = {"INPUT.FORMAT": "BGR", "MODEL.RESNETS.STRIDE_IN_1X1": True}
    given = {"INPUT.FORMAT": cfg.INPUT.FORMAT,
             "MODEL.RESNETS.STRIDE_IN_1X1": cfg.MODEL.RESNETS.STRIDE_IN_1X1}  # fmt: skip
    if given != wanted:
        logger.warning(
            "%s has the weights of a Caffe2 model, whose makers had %s and a MODEL.PIXEL_MEAN and "
            "PIXEL_STD of their own; this config has %s. Detectron2's "
            "ImageNetPretrained/torchvision/R-50.pkl is what the shipped configs fit.",
            *(path, wanted, given),
        )


def _mapper(cfg: CfgNode, is_train: bool) -> CheckedMapper:
    augmentations = DatasetMapper.from_config(cfg, is_train)["augmentations"]
    return CheckedMapper(is_train, augmentations, cfg.INPUT.FORMAT)


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, limit)
