"""Detections in a picture, for LazyConfigs."""

import copy

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T  # noqa: N812 -- Detectron2's own name for it
from omegaconf import DictConfig, OmegaConf

from .checkpoint import Checkpointer
from .train import build_model


class Predictor:
    """One picture at a time through a LazyConfig's model, called as Detectron2's DefaultPredictor.

    ```
    cfg = model_zoo.get_config("dino/dino_r50_4scale_12ep")
    cfg.train.init_checkpoint = "dino.pth"
    predictor = Predictor(cfg)
    instances = predictor(cv2.imread("picture.jpg"))["instances"]
    ```

    Resizing and the order of colours are those of the config's test loader.

    Attributes:
        model: in evaluation mode, on `train.device`.
        metadata: of the config's test data set: names of its classes, for Detectron2's Visualizer.

    Raises:
        ValueError: the config names no weights (`train.init_checkpoint`).
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = copy.deepcopy(cfg)
        if not cfg.train.init_checkpoint:
            raise ValueError("a predictor needs weights: set train.init_checkpoint")
        self.model = build_model(self.cfg).eval()
        Checkpointer(self.model).load(self.cfg.train.init_checkpoint)
        mapper = self.cfg.dataloader.test.mapper
        self.input_format = mapper.image_format
        self.aug = T.AugmentationList(list(instantiate(mapper.augmentations)))
        names = OmegaConf.select(self.cfg, "dataloader.test.dataset.names", default="__unused")
        self.metadata = MetadataCatalog.get(names if isinstance(names, str) else names[0])

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray) -> dict:
        """{"instances": Instances} at the size of the picture.

        Args:
            original_image: (H, W, 3) uint8 in the order BGR, as OpenCV reads it.

        Raises:
            ValueError: another shape or type.
        """
        if not isinstance(original_image, np.ndarray):
            hint = "; cv2.imread returns None for a file that it cannot read"
            raise ValueError(
                f"a picture must be a NumPy array, not {type(original_image).__name__}"
                + (hint if original_image is None else "")
            )
        shape, dtype = original_image.shape, original_image.dtype
        if dtype != np.uint8 or shape[2:] != (3,) or not original_image.size:
            raise ValueError(
                f"a picture must be (height, width, 3) uint8 in BGR, not {shape} {dtype}"
            )
        height, width = original_image.shape[:2]
        rgb = self.input_format == "RGB"
        given = T.AugInput(original_image[:, :, ::-1] if rgb else original_image)
        self.aug(given)
        image = torch.as_tensor(given.image.transpose(2, 0, 1).copy())
        return self.model([{"image": image, "height": height, "width": width}])[0]
