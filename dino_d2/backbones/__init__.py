"""Feature extractors for use without Detectron2, and with it.

They answer like Detectron2's backbones: `forward` returns a dict of feature maps (B, C, h, w),
`output_shape()` their channels and strides. Maps are named by their stride: "stride4", "stride8",
"stride16", "stride32", "stride64".
"""

from .eva02 import EVA02, SimpleFeaturePyramid, build_eva02
from .hierarchical import TimmBackbone, TorchvisionBackbone
from .shape import FeatureShape

__all__ = [
    "EVA02",
    "FeatureShape",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_eva02",
]
