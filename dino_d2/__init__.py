"""DINO and its relatives as Detectron2 detectors; plain PyTorch inside, Detectron2 at the rim.

Importing this package registers the meta-architectures where Detectron2 is installed.
"""

import importlib.util
import warnings

__version__ = "0.1.0"

if importlib.util.find_spec("detectron2") is not None:
    try:
        from .d2 import add_dino_d2_config as add_dino_d2_config
    except Exception as error:  # a broken Detectron2 must not take the rest along
        warnings.warn(
            f"Detectron2 is installed but fails to import, so its adapter is off: {error!r}",
            stacklevel=2,
        )
