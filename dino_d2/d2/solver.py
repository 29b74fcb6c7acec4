"""Learning rates by parameter, by batch size and over time."""

import copy
import logging

from detectron2.config import instantiate
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig

logger = logging.getLogger("detectron2.dino_d2")


class BackboneLR:
    """Factor of the learning rate by parameter name: `factor` for the backbone, 1 for the rest.

    For `lr_factor_func` of Detectron2's `get_default_optimizer_params`; a class, because a config
    with a lambda cannot be loaded again.

    Args:
        sampling: factor for the sampling offsets of deformable attention and for reference points
            (Deformable DETR, official code: 0.1).
    """

    def __init__(self, factor: float, sampling: float = 1.0):
        self.factor, self.sampling = factor, sampling

    def __call__(self, name: str) -> float:
        """The factor for a parameter."""
        parts = name.split(".")
        if "backbone" in parts:
            return self.factor
        return self.sampling if {"sampling_offsets", "reference"} & set(parts) else 1.0


class LayerDecayLR:
    """Factor of the learning rate by parameter name that shrinks towards a ViT's first layer.

    The last block has `decay`, each before it `decay` times that of the next, patches and positions
    as if they were a block before the first; the rest 1. For `lr_factor_func`, as `BackboneLR`.

    Args:
        decay: in (0, 1]; 0.8 for Co-DINO's ViT-L.
        num_layers: blocks of the ViT.
    """

    def __init__(self, decay: float, num_layers: int):
        self.decay, self.num_layers = decay, num_layers

    def __call__(self, name: str) -> float:
        """The factor for a parameter."""
        name = name.removeprefix("detector.")
        return get_vit_lr_decay_rate(name, self.decay, self.num_layers)


def scale_to_batch(cfg: DictConfig) -> DictConfig:
    """A config for `train.reference_batch` images per step, for the number that it has instead.

    The learning rate grows in proportion to the batch; iterations and periods shrink, so that the
    number of images stays. Unchanged where `train.reference_batch` is 0.
    """
    reference, batch = cfg.train.reference_batch, cfg.dataloader.train.total_batch_size
    if not reference or reference == batch:
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.optimizer.lr *= batch / reference
    train = cfg.train
    counts = ("max_iter", "eval_period", "instability_period", "warmup")
    for node, name in (*((train, name) for name in counts), (train.checkpointer, "period")):
        if node[name]:
            node[name] = max(1, round(node[name] * reference / batch))
    logger.info(
        "From %d to %d images per step: learning rate %g, %d iterations",
        *(reference, batch, cfg.optimizer.lr, train.max_iter),
    )
    return cfg


def build_schedule(cfg: DictConfig) -> ParamScheduler:
    """The config's learning rates over time, as factors; the first `train.warmup` iterations rise
    to them linearly from a thousandth.

    Raises:
        ValueError: so many iterations are not shorter than training.
    """
    schedule, train = instantiate(cfg.lr_multiplier), cfg.train
    if not train.warmup:
        return schedule
    if train.warmup >= train.max_iter:
        raise ValueError(f"train.warmup={train.warmup} is not below max_iter={train.max_iter}")
    return WarmupParamScheduler(schedule, 0.001, train.warmup / train.max_iter)
