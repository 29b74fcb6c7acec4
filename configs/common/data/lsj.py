"""Large-scale jitter and copy-paste on squares (Ghiasi et al., CVPR 2021)."""

from detectron2.config import LazyCall as L

from dino_d2.d2.augmentation import (
    JitterMapper,
    SquareMapper,
    fit_into_square,
    large_scale_jitter,
    load_pairs,
)


def with_jitter(dataloader, size):
    """Change a data loader to squares of so many pixels.

    Without masks, boxes are pasted. With `train.dataset = L(load_datasets)(names=...)`, nothing is.
    """
    names = dataloader.train.dataset.names
    dataloader.train.dataset = L(load_pairs)(names=names)
    dataloader.train.mapper = L(JitterMapper)(
        augmentations=L(large_scale_jitter)(size=size), image_format="RGB"
    )
    dataloader.test.mapper = L(SquareMapper)(
        augmentations=L(fit_into_square)(size="${....train.mapper.augmentations.size}"),
        image_format="${...train.mapper.image_format}",
    )
