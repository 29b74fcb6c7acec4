"""Configuration: keys for yacs, and LazyConfig overrides that are checked."""

import copy
import difflib
import inspect

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

# Arguments of the builders in `dino_d2.models`; "" stands for None. NUM_DETECTIONS of None
# are as many as published: 100 for DN-DETR's deformable form, else 300.
_COMMON = {"NUM_CLASSES": 80, "NUM_QUERIES": 300, "NUM_DETECTIONS": 300}
_DENSE = {**_COMMON, "IN_FEATURES": ["res5"], "NUM_LEVELS": 1, "NUM_PATTERNS": 0}
_DEFORMABLE = {**_COMMON, "IN_FEATURES": ["res3", "res4", "res5"], "NUM_LEVELS": 4}
_YACS = {
    "DINO": {**_DEFORMABLE, "NUM_QUERIES": 900, "DENOISING": "cdn", "DENOISING_QUERIES": 200},
    "CO_DETR": {  # SOFT_NMS is its threshold, 0 for none
        "BASE": "dino",
        "CO_HEADS": ["faster_rcnn", "atss"],
        "NUM_CLASSES": 80,
        "NUM_QUERIES": 900,
        "NUM_DETECTIONS": 300,
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "NUM_LEVELS": 5,
        "ENCODER_LAYERS": 6,
        "DECODER_LAYERS": 6,
        "SOFT_NMS": 0.8,
    },
    "DN_DETR": {**_DENSE, "NUM_DETECTIONS": None, "DEFORMABLE": False, "DENOISING_GROUPS": 5},
    "DAB_DETR": _DENSE,
    "DAB_DEFORMABLE_DETR": {**_DEFORMABLE, "NUM_DETECTIONS": 100},
    "DEFORMABLE_DETR": {
        **_DEFORMABLE,
        "NUM_DETECTIONS": 100,
        "BOX_REFINEMENT": False,
        "TWO_STAGE": False,
    },
}


def add_dino_d2_config(cfg: CfgNode) -> None:
    """Add the keys of this package's meta-architectures to a yacs config.

    ```
    cfg = get_cfg()
    add_dino_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DINO"
    ```
    """
    for name, settings in _YACS.items():
        cfg.MODEL[name] = CfgNode(copy.deepcopy(settings))


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Apply "a.b=c" overrides; a key that means nothing is an error instead of a new key.

    Raises:
        KeyError: neither the config nor the signature of what it builds knows the key.
    """
    for override in overrides:
        _check_key(cfg, override.split("=", 1)[0].lstrip("+"))
    return LazyConfig.apply_overrides(cfg, overrides)


def _check_key(cfg: DictConfig, key: str) -> None:
    *parents, last = key.split(".")
    node = cfg
    for parent in parents:
        known = _names(node)
        if parent not in known:
            _raise_unknown(key, parent, known)
        node = node[int(parent)] if OmegaConf.is_list(node) else node[parent]
    known = _names(node)
    if OmegaConf.is_dict(node) and "_target_" in node:
        target = node["_target_"]
        target = locate(target) if isinstance(target, str) else target
        parameters = inspect.signature(target).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return
        known |= set(parameters)
    if last not in known:
        _raise_unknown(key, last, known)


def _names(node) -> set[str]:
    """What may follow in a key: those of a dictionary, the numbers of a list, none of a value."""
    if OmegaConf.is_dict(node):
        return set(map(str, node))
    return {str(i) for i in range(len(node))} if OmegaConf.is_list(node) else set()


def _raise_unknown(key: str, part: str, known: set[str]) -> None:
    close = difflib.get_close_matches(part, known, 1)
    hint = (
        f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
    )
    raise KeyError(f"unknown config key {key!r}: there is no {part!r} here; {hint}")
