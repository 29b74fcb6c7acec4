"""Learning rates by parameter."""


class BackboneLR:
    """Factor of the learning rate by parameter name: `factor` for the backbone, 1 for the rest.

    For `lr_factor_func` of Detectron2's `get_default_optimizer_params`; a class, because a config
    with a lambda cannot be loaded again.
    """

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, name: str) -> float:
        """The factor for a parameter."""
        return self.factor if "backbone" in name.split(".") else 1.0
