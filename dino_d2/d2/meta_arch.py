"""The detectors as Detectron2 meta-architectures."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..box_ops import xyxy_to_cxcywh
from ..diagnostics.instability import matched_objects
from ..errors import NonFiniteError, TargetError
from ..models import (
    DETR,
    build_co_deformable_base,
    build_co_detr,
    build_co_dino_base,
    build_dab_deformable_detr,
    build_dab_detr,
    build_deformable_detr,
    build_dino,
    build_dn_detr,
)
from ..postprocess import Suppression, postprocess
from ..preprocess import PIXEL_MEAN, PIXEL_STD, check_images, make_padding_mask
from ..transfer import to_device
from ..types import Detections, Predictions, Target

logger = logging.getLogger("detectron2.dino_d2")


class DetrMetaArch(nn.Module):
    """Any detector of the family, with the contract of Detectron2's models.

    Takes a list of dicts with "image", in training also "instances". Returns a dict of losses in
    training, else a list of {"instances": Instances} at the size that "height" and "width" name.

    Args:
        detector: the network; images go in normalised, boxes come out relative.
        pixel_mean, pixel_std: of images in 0..255, in the channel order of `input_format`.
        input_format: "RGB" or "BGR": how the data mapper reads images.
        num_detections: at most so many per image.
        suppression: removes duplicates, which these detectors hardly need. Results then also have
            "unsuppressed" instances, without it.
        detect_by: a co-head of Co-DETR, whose own detections to return instead; "" for none.
        vis_period: every so many iterations, show ground truth and predictions of one training
            image in the event storage; 0 never.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: DETR,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        input_format: str = "RGB",
        num_detections: int = 300,
        suppression: Suppression | None = None,
        detect_by: str = "",
        vis_period: int = 0,
    ):
        super().__init__()
        if vis_period:
            import cv2  # noqa: F401 -- Detectron2's Visualizer needs it: rather miss it now
        self.detector = detector
        self.input_format = input_format
        self.num_detections = num_detections
        self.suppression = suppression
        self.detect_by = detect_by
        self.vis_period = vis_period
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.register_load_state_dict_pre_hook(_accept_bare_detector)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Arguments from a yacs config, see `add_dino_d2_config`: each key under the model's name
        is an argument of its builder.
        """
        unused = [f"MODEL.{key}" for key in ("MASK_ON", "KEYPOINT_ON") if cfg.MODEL[key]]
        if unused:
            logger.warning("%s finds boxes only: no effect of %s", cls.__name__, ", ".join(unused))
        settings = {name.lower(): value for name, value in cfg.MODEL[cls.yacs_name].items()}
        few = settings.get("deformable") or settings.get("base") == "deformable_detr"
        num_detections = settings.pop("num_detections") or (100 if few else 300)
        soft_nms, detect_by = settings.pop("soft_nms", 0), settings.pop("detect_by", "")
        settings = {name: None if value == "" else value for name, value in settings.items()}
        return {
            "detector": cls.build(backbone=build_backbone(cfg), **settings),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "num_detections": num_detections,
            "suppression": Suppression("soft_nms", soft_nms) if soft_nms else None,
            "detect_by": detect_by,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model lives and images are moved to."""
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        """K of the detector."""
        return self.detector.num_classes

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """See the class. Errors about an image name its file."""
        images = self.preprocess_image(batched_inputs)
        mask = make_padding_mask(images.image_sizes, images.tensor)
        try:
            if not self.training:
                return self._detect(images, mask, batched_inputs)
            targets = [_target(i, source) for i, source in enumerate(batched_inputs)]
            losses = self.detector(images.tensor, mask, targets)
        except (TargetError, NonFiniteError) as error:
            source = batched_inputs[error.image]
            described = f"{source.get('file_name', 'unknown')}, id {source.get('image_id')}"
            error.args = (f"{error} ({described})",)
            raise
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs[:1])
        return losses

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, pad and batch the images."""
        images = [x["image"] for x in batched_inputs]
        check_images(images)
        images = [image.to(self.device, non_blocking=True) for image in images]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        backbone = self.detector.backbone
        return ImageList.from_tensors(
            images,
            getattr(backbone, "size_divisibility", 0),
            padding_constraints=getattr(backbone, "padding_constraints", None),
        )

    def _detect(self, images: ImageList, mask: Tensor, batched_inputs: list[dict]) -> list[dict]:
        if self.detect_by:
            detections = self.detector.detect_by(self.detect_by, images.tensor, mask)
        else:
            detections = self._rank(self.detector(images.tensor, mask), images.image_sizes)
        results = []
        for number, (source, size) in enumerate(
            zip(batched_inputs, images.image_sizes, strict=True)
        ):
            found = detections[number]
            if not torch.cat([found.scores, found.boxes.flatten()]).isfinite().all():
                where = self.detect_by or "the last decoder layer"
                raise NonFiniteError(number, where, "class scores or boxes")
            kept = {"instances": found}
            if self.suppression is not None and not self.detect_by:
                kept = {"instances": self.suppression(found), "unsuppressed": found}
            results.append({name: self._instances(d, size, source) for name, d in kept.items()})
        return results

    def _rank(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """The best of every image; before suppression, as many as there are queries."""
        count = self.num_detections
        if self.suppression is not None:
            count = predictions.boxes.shape[2]
        sizes = to_device(image_sizes, torch.float32, self.device)
        detections = postprocess(predictions, sizes, count, clip=True)
        return [Detections(*of_image) for of_image in zip(*detections, strict=True)]

    def _instances(self, found: Detections, size: tuple[int, int], source: dict) -> Instances:
        """At the size that the input names."""
        scores, labels, boxes = (tensor[: self.num_detections] for tensor in found)
        boxes = Boxes(boxes.clone())  # to be scaled in place
        instances = Instances(size, pred_boxes=boxes, scores=scores, pred_classes=labels)
        height, width = source.get("height", size[0]), source.get("width", size[1])
        return detector_postprocess(instances, height, width)

    def match(self, batched_inputs: list[dict]) -> np.ndarray:
        """(B, Q): the object of its image that every query is matched to, or -1."""
        images = self.preprocess_image(batched_inputs)
        mask = make_padding_mask(images.image_sizes, images.tensor)
        targets = [_target(i, source) for i, source in enumerate(batched_inputs)]
        assignment, num_queries = self.detector.match(images.tensor, mask, targets)
        counts = tuple(len(target.labels) for target in targets)
        return matched_objects(assignment, counts, num_queries)

    @torch.no_grad()
    def visualize_training(self, batched_inputs: list[dict]) -> None:
        """Put ground truth beside the 20 best predictions into the event storage."""
        from detectron2.utils.visualizer import Visualizer  # needs OpenCV, nothing else here does

        self.eval()
        source = batched_inputs[0]
        size = dict(zip(("height", "width"), source["image"].shape[1:], strict=True))
        found = self.forward([{**source, **size}])[0]["instances"]
        self.train()
        image = convert_image_to_rgb(source["image"].permute(1, 2, 0), self.input_format)
        pictures = []
        for boxes in (source["instances"].gt_boxes, found.pred_boxes[:20]):
            colours = ["lime"] * len(boxes)  # the default draws from the data loader's generator
            drawn = Visualizer(image).overlay_instances(
                boxes=boxes.tensor.cpu().numpy(), assigned_colors=colours
            )
            pictures.append(drawn.get_image())
        picture = np.concatenate(pictures, 1).transpose(2, 0, 1)
        get_event_storage().put_image("Left: ground truth; right: predictions", picture)


@META_ARCH_REGISTRY.register()
class DINO(DetrMetaArch):
    """DINO (ICLR 2023)."""

    build, yacs_name = staticmethod(build_dino), "DINO"


@META_ARCH_REGISTRY.register()
class DNDETR(DetrMetaArch):
    """DN-DETR (CVPR 2022)."""

    build, yacs_name = staticmethod(build_dn_detr), "DN_DETR"


@META_ARCH_REGISTRY.register()
class DABDETR(DetrMetaArch):
    """DAB-DETR (ICLR 2022)."""

    build, yacs_name = staticmethod(build_dab_detr), "DAB_DETR"


@META_ARCH_REGISTRY.register()
class DABDeformableDETR(DetrMetaArch):
    """DAB-DETR on deformable attention."""

    build, yacs_name = staticmethod(build_dab_deformable_detr), "DAB_DEFORMABLE_DETR"


@META_ARCH_REGISTRY.register()
class DeformableDETR(DetrMetaArch):
    """Deformable DETR (ICLR 2021)."""

    build, yacs_name = staticmethod(build_deformable_detr), "DEFORMABLE_DETR"


def _build_co_detr(
    backbone: nn.Module,
    base: str,
    co_heads: Sequence[str],
    co_head_weight: float,
    query_weight: float,
    in_features: Sequence[str],
    num_classes: int,
    num_levels: int | None,
    num_queries: int | None,
    encoder_layers: int,
    decoder_layers: int,
) -> DETR:
    """From the keys of MODEL.CO_DETR."""
    bases = {
        "dino": (build_co_dino_base, 5, 900),
        "deformable_detr": (build_co_deformable_base, 4, 300),
    }
    if base not in bases:
        raise ValueError(f"MODEL.CO_DETR.BASE must be in {list(bases)}, not {base!r}")
    build, levels, queries = bases[base]
    detector = build(
        backbone,
        in_features,
        num_classes,
        num_levels or levels,
        num_queries or queries,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
    )
    return build_co_detr(
        detector, co_heads, co_head_weight=co_head_weight, query_weight=query_weight
    )


@META_ARCH_REGISTRY.register()
class CoDETR(DetrMetaArch):
    """Co-DETR (ICCV 2023)."""

    build, yacs_name = staticmethod(_build_co_detr), "CO_DETR"


def _accept_bare_detector(module, state_dict, prefix, *_) -> None:
    """Load weights of a plain `DETR`, as converters write them, under the detector's prefix."""
    names = [name for name in state_dict if name.startswith(prefix)]
    if any(name.startswith(f"{prefix}detector.") for name in names):
        return
    for name in names:
        state_dict[f"{prefix}detector.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def _target(number: int, source: dict) -> Target:
    """One image's annotations, relative to the image that goes into the network."""
    if "instances" not in source:
        raise KeyError(f"no annotations ('instances') for {source.get('file_name')} in training")
    instances = source["instances"]
    height, width = instances.image_size
    if (height, width) != tuple(source["image"].shape[1:]):
        size = tuple(source["image"].shape[1:])
        raise TargetError(number, f"they are of an image of {(height, width)}, not of {size}")
    boxes = instances.gt_boxes.tensor / torch.tensor([width, height, width, height])
    return Target(instances.gt_classes, xyxy_to_cxcywh(boxes))
