"""The adapter to Detectron2. The only package here that imports it."""

from .checkpoint import Checkpointer
from .co_heads import DenseCoHead, ROICoHead
from .config import add_dino_d2_config, apply_overrides, load_config
from .datasets import register_datasets
from .meta_arch import (
    DABDETR,
    DINO,
    DNDETR,
    CoDETR,
    DABDeformableDETR,
    DeformableDETR,
    DetrMetaArch,
)
from .predictor import Predictor
from .ranks import launch
from .train import evaluate, evaluate_checkpoint, train
from .trainer import Trainer
from .yacs import DetrTrainer

__all__ = [
    "DABDETR",
    "DINO",
    "DNDETR",
    "Checkpointer",
    "CoDETR",
    "DABDeformableDETR",
    "DeformableDETR",
    "DenseCoHead",
    "DetrMetaArch",
    "DetrTrainer",
    "Predictor",
    "ROICoHead",
    "Trainer",
    "add_dino_d2_config",
    "apply_overrides",
    "evaluate",
    "evaluate_checkpoint",
    "launch",
    "load_config",
    "register_datasets",
    "train",
]
