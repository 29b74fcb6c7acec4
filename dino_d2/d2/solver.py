"""Learning rates by parameter."""

from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate


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
