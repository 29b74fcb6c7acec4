"""Training in yacs pipelines: Detectron2's DefaultTrainer with what DETRs need."""

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from .data import check_num_classes, coco_evaluator, load_datasets
from .mapper import CheckedMapper
from .solver import BackboneLR


class DetrTrainer(DefaultTrainer):
    """`DefaultTrainer` with AdamW, gradients clipped as a whole, and checked data.

    SOLVER.CLIP_GRADIENTS.CLIP_VALUE limits the L2 norm of all gradients together. Data sets are
    names, or "annotations.json:image_folder"; crops and sizes are those of INPUT.
    """

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
        return build_detection_train_loader(cfg, dataset=dataset, mapper=_mapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """One image at a time."""
        return build_detection_test_loader(
            load_datasets(dataset_name),
            mapper=_mapper(cfg, False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        """COCO's average precision of boxes."""
        return coco_evaluator(dataset_name, cfg.OUTPUT_DIR)


def _mapper(cfg: CfgNode, is_train: bool) -> CheckedMapper:
    augmentations = DatasetMapper.from_config(cfg, is_train)["augmentations"]
    return CheckedMapper(is_train, augmentations, cfg.INPUT.FORMAT)


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, limit)
