"""Errors that know which image of the batch they are about."""


class TargetError(ValueError):
    """A training target is unusable. `image` is the index in the batch."""

    def __init__(self, image: int, message: str):
        super().__init__(f"targets of image {image} of the batch: {message}")
        self.image = image


class NonFiniteError(FloatingPointError):
    """A prediction is NaN or infinite. `image` is the index in the batch."""

    def __init__(self, image: int, where: str, what: str):
        super().__init__(f"non-finite {what} in {where} for image {image} of the batch")
        self.image = image
