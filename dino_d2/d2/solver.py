"""Learning rates by parameter."""


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
