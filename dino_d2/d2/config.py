"""Configuration: keys for yacs, and LazyConfig overrides that are checked."""

import copy
import difflib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..model_zoo import root

# Arguments of the builders in `dino_d2.models`; "" stands for None. NUM_DETECTIONS of None
# are as many as published: 100 for DN-DETR's deformable form, else 300.
_COMMON = {"NUM_CLASSES": 80, "NUM_QUERIES": 300, "NUM_DETECTIONS": 300}
_DENSE = {**_COMMON, "IN_FEATURES": ["res5"], "NUM_LEVELS": 1, "NUM_PATTERNS": 0}
_DEFORMABLE = {**_COMMON, "IN_FEATURES": ["res3", "res4", "res5"], "NUM_LEVELS": 4}
_YACS = {
    "DINO": {**_DEFORMABLE, "NUM_QUERIES": 900, "DENOISING": "cdn", "DENOISING_QUERIES": 200},
    "CO_DETR": {  # SOFT_NMS is its threshold, 0 for none
        "BASE": "dino",  # or "deformable_detr", with SOFT_NMS 0
        "CO_HEADS": ["faster_rcnn", "atss"],
        "CO_HEAD_WEIGHT": 2.0,
        "QUERY_WEIGHT": 1.0,
        "NUM_CLASSES": 80,
        "NUM_QUERIES": None,  # as published for the base, like the next two
        "NUM_DETECTIONS": None,
        "NUM_LEVELS": None,
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "ENCODER_LAYERS": 6,
        "DECODER_LAYERS": 6,
        "SOFT_NMS": 0.8,
        "DETECT_BY": "",
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

# What a YAML config may build. A Python config is a program, and may do anything.
_TARGETS = (
    "detectron2.data.",
    "detectron2.evaluation.",
    "detectron2.layers.",
    "detectron2.modeling.",
    "detectron2.solver.",
    "dino_d2.backbones.",
    "dino_d2.d2.",
    "dino_d2.losses.",
    "dino_d2.models.",
    "dino_d2.postprocess.",
    "fvcore.common.param_scheduler.",
    "torch.nn.",
    "torch.optim.",
)
_MAX_BYTES, _MAX_NODES = 1 << 20, 100_000


class ConfigError(ValueError):
    """A config file cannot be used; the message names the file and the key."""


def load_config(path: str | os.PathLike) -> DictConfig:
    """A LazyConfig from a .py file, which is a program and to be trusted, or from a .yaml file.

    YAML files run no code: they hold plain values, may build detectors, data sets, optimizers and
    their parts, and read no environment variables.

    Raises:
        ConfigError: a YAML file is no such config, or has a key that means nothing.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        return LazyConfig.load(str(path))
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path}: more than {_MAX_BYTES} bytes are no config")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not plain YAML ({error})") from error
    try:
        _check_content(content)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return OmegaConf.create(content, flags={"allow_objects": True})


def _check_content(content: object) -> None:
    if not isinstance(content, dict):
        raise ValueError("no dictionary of settings")
    known = LazyConfig.load(str(root() / "configs" / "common" / "train.py"))["train"]
    sections = {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    _check_names("", content, sections)
    _check_names("train.", content.get("train") or {}, set(known))
    for count, (key, value) in enumerate(_walk("", content)):
        if count > _MAX_NODES:
            raise ValueError(f"more than {_MAX_NODES} values, most of them by aliases")
        if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
            raise ValueError(f"{key}: {value!r} would call a function")
        if isinstance(value, dict) and "_target_" in value:
            parameters = _parameters(_find_target(key, value["_target_"]))
            if parameters is not None:
                _check_names(f"{key}.", value, {"_target_", *parameters})


def _check_names(prefix: str, given: dict, known: set[str]) -> None:
    for name in given:
        if name not in known:
            _raise_unknown(f"{prefix}{name}", str(name), known)


def _walk(key: str, value: object) -> Iterator[tuple[str, object]]:
    """All values with their keys, as often as they are used."""
    yield key, value
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    for name, part in parts.items() if isinstance(parts, dict) else ():
        yield from _walk(f"{key}.{name}".lstrip("."), part)


def _find_target(key: str, name: object) -> object:
    """What a YAML file wants to build; nothing is imported that it may not have.

    Raises:
        ValueError: it may not, or there is no such thing.
    """
    fine = isinstance(name, str) and name.startswith(_TARGETS) and "._" not in name
    try:
        target = locate(name) if fine else None
    except Exception:
        target = None
    origin = f"{getattr(target, '__module__', '')}."  # a module's imports are not its own
    if not callable(target) or not origin.startswith((*_TARGETS, "dino_d2.")):
        raise ValueError(
            f"{key}: a YAML file may not build {name!r}, only what is in "
            f"{', '.join(prefix[:-1] for prefix in _TARGETS)}"
        )
    return target


def _parameters(target: object) -> set[str] | None:
    """Names of the arguments; None if any will do."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def add_dino_d2_config(cfg: CfgNode) -> None:
    """Add the keys of this package's meta-architectures, and of `DetrTrainer`, to a yacs config.

    ```
    cfg = get_cfg()
    add_dino_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DINO"
    ```
    """
    for name, settings in _YACS.items():
        cfg.MODEL[name] = CfgNode(copy.deepcopy(settings))
    # of DetrTrainer; as in configs/common/train.py
    cfg.MODEL.WEIGHTS_CLASSES = ""  # init_classes
    cfg.MODEL.WEIGHTS_SKIP = []  # init_skip
    cfg.SOLVER.ACCUMULATE = 1  # accumulate
    cfg.SOLVER.EMA_DECAY = 0.0  # ema.decay
    cfg.TEST.BEST_METRIC = "bbox/AP"  # best_metric


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Apply "a.b=c" overrides; a key that means nothing is an error instead of a new key.

    Raises:
        KeyError: neither the config nor the signature of what it builds knows the key.
        ConfigError: a number, text or switch is to become something else.
    """
    keys = [override.split("=", 1)[0].lstrip("+") for override in overrides]
    for key in keys:
        _check_key(cfg, key)
    trial = LazyConfig.apply_overrides(copy.deepcopy(cfg), overrides)
    for key in keys:
        _check_kind(key, OmegaConf.select(cfg, key), OmegaConf.select(trial, key))
    return LazyConfig.apply_overrides(cfg, overrides)


def _check_kind(key: str, before: object, after: object) -> None:
    kinds = {"true or false": bool, "a number": int | float, "a text": str}
    for name, kind in kinds.items():
        if isinstance(before, kind):  # a truth value is a number, too: the first counts
            fits = isinstance(after, kind) and isinstance(after, bool) == (kind is bool)
            several = kind is str and OmegaConf.is_list(after)  # of data sets
            if not (fits or several or after is None):
                raise ConfigError(f"{key}={after} must be {name}, such as {before!r}")
            return


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
        parameters = _parameters(target)
        if parameters is None:
            return
        known |= parameters
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
