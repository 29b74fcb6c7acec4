"""Training and evaluation from a LazyConfig; `train_net.py` is its command line."""

import logging
import os
from collections.abc import Callable

import torch
from detectron2.config import instantiate
from detectron2.engine import default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import distributed, nn

from ..checkpoint import load_backbone
from ..diagnostics.curves import plot_curves
from ..models import compile_layers, recompute_layers
from .checkpoint import Checkpointer
from .data import check_num_classes, class_names
from .ema import EMAHook
from .evaluation import evaluate_checked
from .hooks import (
    EpochHook,
    InstabilityHook,
    NoObjectsHook,
    PeriodicCheckpointer,
    best_checkpointer,
    first_step,
    save_average,
    saved_when_stopped,
)
from .loading import is_ours, no_workers_left, watch_workers
from .ranks import HangHook
from .sharding import gathered, is_sharded, shard, take_whole_state
from .solver import build_schedule, scale_to_batch
from .stopping import StopSignals
from .trainer import Trainer, autocast

logger = logging.getLogger("detectron2.dino_d2")


def build_model(cfg: DictConfig) -> nn.Module:
    """The config's model on its device; "auto" is a GPU where there is one, else the CPU.

    `train.init_backbone` loads ImageNet weights, unless `train.init_checkpoint` names a whole
    detector's. `train.compile` and `train.recompute` say how layers run.
    """
    model = instantiate(cfg.model)
    if cfg.train.init_backbone and not cfg.train.init_checkpoint:
        path = PathManager.get_local_path(cfg.train.init_backbone)
        load_backbone(model.detector.backbone, path)
        logger.info("Backbone initialised from %s", cfg.train.init_backbone)
    if cfg.train.compile:
        compile_layers(model.detector)
    if cfg.train.recompute:
        recompute_layers(model.detector)
    device = cfg.train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def train(cfg: DictConfig, resume: bool = False) -> dict:
    """Train as the config says and return the results of the last evaluation, in process 0.

    The output directory then holds checkpoints, `metrics.json`, TensorBoard events, `log.txt` and
    `curves.png`. With `resume`, training goes on from the newest valid checkpoint there, as if it
    had never stopped. SIGTERM and SIGINT end it after the current step, with a checkpoint.
    """
    steps = cfg.train.max_iter
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train.max_iter must be an integer above 0, not {steps}")
    with StopSignals() as signals, no_workers_left():
        return _train(scale_to_batch(cfg), resume, signals)


def _train(cfg: DictConfig, resume: bool, signals: StopSignals) -> dict:
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    loader = watch_workers(instantiate(cfg.dataloader.train), cfg.train.worker_timeout)
    check_num_classes(_dataset_names(cfg.dataloader.train), model.num_classes)
    parallel = _parallelise(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    take_whole_state(optimizer)
    trainer = Trainer(
        parallel,
        loader,
        optimizer,
        model.device.type,
        _precision(cfg),
        cfg.train.clip_grad.max_norm,
        cfg.train.seed if cfg.train.seed is not None and cfg.train.seed >= 0 else None,
        cfg.train.output_dir,
        signals,
        cfg.train.worker_timeout,
        cfg.train.accumulate,
    )
    checkpointer = Checkpointer(
        parallel, cfg.train.output_dir, skip=cfg.train.init_skip, trainer=trainer
    )
    if cfg.train.init_classes:
        names = _dataset_names(cfg.dataloader.train)
        checkpointer.classes = class_names(cfg.train.init_classes, names)
    ema = EMAHook(parallel, cfg.train.ema.decay) if cfg.train.ema.decay else None
    results = {}

    def run_evaluation() -> dict:
        if ema is not None:  # first, for files of detections are to be those of the raw weights
            with ema.applied():
                results.update(ema=evaluate(cfg, parallel))
        results.update(evaluate(cfg, parallel))
        if is_sharded(parallel):  # all take part in saving, and so in judging what is best
            results.update(comm.all_gather(results)[0])
        return results

    trainer.register_hooks(_hooks(cfg, parallel, checkpointer, ema, run_evaluation))
    if comm.is_main_process() and is_ours(loader):
        batch_size = cfg.dataloader.train.total_batch_size
        trainer.register_hooks([EpochHook(len(loader.dataset), batch_size)])
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    with saved_when_stopped(trainer, checkpointer):
        trainer.train(first_step(trainer, checkpointer, cfg.train.max_iter), cfg.train.max_iter)
    if ema is not None:
        save_average(ema, cfg.train.output_dir)
    if comm.is_main_process():
        plot_curves(
            os.path.join(cfg.train.output_dir, "metrics.json"),
            os.path.join(cfg.train.output_dir, "curves.png"),
        )
    return results


def _parallelise(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """For one process, as it is."""
    if cfg.train.fsdp and _precision(cfg) == "float16":
        raise ValueError("train.fsdp does not go with float16: set train.amp.dtype=bfloat16")
    if not cfg.train.fsdp or comm.get_world_size() == 1:
        device_ids = None if model.device.type == "cpu" else [model.device]
        return create_ddp_model(model, device_ids=device_ids, **cfg.train.ddp)
    return shard(model)


def _hooks(
    cfg: DictConfig,
    model: nn.Module,
    checkpointer: Checkpointer,
    ema: EMAHook | None,
    run_evaluation: Callable,
) -> list[hooks.HookBase | None]:
    """In the order in which they run; None where this process has no part."""
    main, out = comm.is_main_process(), cfg.train.output_dir
    saves = main or is_sharded(model)
    periods = cfg.train.checkpointer if main else {"period": cfg.train.checkpointer.period}
    writers = default_writers(out, cfg.train.max_iter) if main else []
    return [
        hooks.IterationTimer(warmup_iter=0),  # what prints needs a time from the first step on
        hooks.LRScheduler(scheduler=build_schedule(cfg)),
        NoObjectsHook(),
        ema,  # this and the next before the checkpoint that holds their state
        _instability_hook(cfg, model),
        PeriodicCheckpointer(checkpointer, **periods) if saves else None,
        hooks.EvalHook(cfg.train.eval_period, run_evaluation),
        best_checkpointer(cfg.train.best_metric, model, out, ema) if saves else None,
        hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
        # last, to watch over the evaluation that ends training
        HangHook(cfg.train.hang_timeout) if comm.get_world_size() > 1 else None,
    ]


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Results of the config's evaluator on its test set; {} without one.

    Runs in the precision of training.

    Raises:
        EvaluationError: see `CheckedEvaluator`.
        Stopped: there was a signal, in any process.
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    loader = instantiate(cfg.dataloader.test)
    evaluator = instantiate(cfg.dataloader.evaluator)
    bare = getattr(model, "module", model)
    check_num_classes(_dataset_names(cfg.dataloader.test), bare.num_classes)
    if comm.get_world_size() > 1:  # statistics of batch norms differ; checkpoints have process 0's
        for buffer in bare.buffers():
            distributed.broadcast(buffer, 0)
    with autocast(bare.device.type, _precision(cfg)), gathered(model):
        results = evaluate_checked(model, loader, evaluator, cfg.train.worker_timeout)
    print_csv_format(results)
    return results


def evaluate_checkpoint(cfg: DictConfig) -> dict:
    """Evaluate the weights of `train.init_checkpoint`.

    Raises:
        ValueError: the config names no checkpoint.
    """
    if not cfg.train.init_checkpoint:
        raise ValueError("evaluation needs weights: set train.init_checkpoint")
    model = build_model(cfg)
    Checkpointer(model).load(cfg.train.init_checkpoint)
    with no_workers_left():
        return evaluate(cfg, model)


def _instability_hook(cfg: DictConfig, model: nn.Module) -> hooks.HookBase | None:
    period = cfg.train.instability_period
    if not period:
        return None
    loader = instantiate(cfg.dataloader.matching)
    return InstabilityHook(period, model, loader, _precision(cfg))


def _precision(cfg: DictConfig) -> str:
    return cfg.train.amp.dtype if cfg.train.amp.enabled else "float32"


def _dataset_names(loader: DictConfig) -> str | list[str]:
    names = OmegaConf.select(loader, "dataset.names", default=[])
    return OmegaConf.to_object(names) if OmegaConf.is_config(names) else names
