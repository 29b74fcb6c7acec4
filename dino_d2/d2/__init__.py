"""The adapter to Detectron2. The only package here that imports it."""

from .checkpoint import Checkpointer
from .config import add_dino_d2_config, apply_overrides, load_config
from .meta_arch import (
    DABDETR,
    DINO,
    DNDETR,
    DABDeformableDETR,
    DeformableDETR,
    DetrMetaArch,
)
from .ranks import launch
from .train import evaluate, evaluate_checkpoint, train
from .trainer import Trainer

__all__ = [
    "DABDETR",
    "DINO",
    "DNDETR",
    "Checkpointer",
    "DABDeformableDETR",
    "DeformableDETR",
    "DetrMetaArch",
    "Trainer",
    "add_dino_d2_config",
    "apply_overrides",
    "evaluate",
    "evaluate_checkpoint",
    "launch",
    "load_config",
    "train",
]
