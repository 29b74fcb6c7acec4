"""DINO with timm's ConvNeXts."""

from detectron2.config import LazyCall as L

from dino_d2.backbones import TimmBackbone

from .dino_r50 import model

model.detector.backbone = L(TimmBackbone)(
    name="convnext_tiny", strides=(8, 16, 32), output_norm=1e-6, drop_path=0.2
)
model.detector.in_features = ["stride8", "stride16", "stride32"]

IMAGENET = "https://dl.fbaipublicfiles.com/convnext"
