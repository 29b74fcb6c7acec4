"""Data sets for Detectron2's loaders: registered names, or any COCO-format json; all checked."""

import logging
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)
from detectron2.structures import BoxMode

from ..checkpoint import ClassNames
from ..data.annotations import check_annotations, select_images
from ..data.check import Checked, load_checked
from ..data.coco import read_class_names
from ..data.findings import DataError, Findings
from ..data.layouts import split_pair
from ..data.writing import write_annotations

logger = logging.getLogger("detectron2.dino_d2")


def register_if_file(name: str) -> str:
    """Turn "annotations.json:image_folder" into a registered data set of that name.

    Names that are already registered are returned as they are.

    Raises:
        FileNotFoundError: the json or the folder does not exist.
        KeyError: the name is neither registered nor of that form.
    """
    if name in DatasetCatalog.list():
        return name
    pair = split_pair(name)
    if pair is None:
        raise KeyError(
            f"data set {name!r} is not registered; give a registered name or "
            "'annotations.json:image_folder'"
        )
    for path, exists in zip(pair, (pair.annotations.is_file(), pair.images.is_dir()), strict=True):
        if not exists:
            raise FileNotFoundError(f"{str(path)!r}, of data set {name!r}, does not exist")
    register_coco(name, *map(str, pair))
    return name


def register_coco(name: str, json: str, images: str, **metadata) -> None:
    """Register a COCO-format json under a name; it is checked whenever it is loaded.

    Args:
        json, images: paths of the json and of its image folder.
        metadata: for Detectron2's `MetadataCatalog`. `file_parts`: see `check_data_set`;
            `absent_files`: names of images that are left out.
    """
    DatasetCatalog.register(name, partial(_load_coco, name))
    MetadataCatalog.get(name).set(
        json_file=json, image_root=images, evaluator_type="coco", **metadata
    )


def load_datasets(
    names: str | Sequence[str], filter_empty: bool = False, masks: bool = False
) -> list[dict]:
    """Detectron2's dicts of one or more data sets, given as `register_if_file` takes them.

    Everything is checked; what is dropped or converted is logged. Images without objects stay by
    default: they are part of DETR's training. A json's keypoints are left out, and its masks unless
    asked for.

    Raises:
        DataError: data cannot be used; the message names file, image and annotation ids, and field.
    """
    names = [register_if_file(name) for name in ([names] if isinstance(names, str) else names)]
    sources = [source for name in names for source in _load(name, masks)]
    check_metadata_consistency("thing_classes", names)
    if filter_empty:
        sources = filter_images_with_only_crowd_annotations(sources)
    if not sources:
        raise DataError(f"{', '.join(names)}: there are no images")
    if "annotations" in sources[0]:
        print_instances_class_histogram(sources, MetadataCatalog.get(names[0]).thing_classes)
    return sources


def coco_evaluator(
    dataset_name: str | Sequence[str], output_dir: str | None = None, unsuppressed: bool = False
) -> DatasetEvaluator:
    """Detectron2's COCOEvaluator for boxes on a data set as `register_if_file` takes it.

    Annotations that the checks drop are no ground truth.

    Args:
        unsuppressed: also evaluate the detections before the suppression of duplicates, as
            "bbox_unsuppressed".

    Raises:
        ValueError: several data sets; they cannot be evaluated as one.
        DataError: see `load_datasets`.
    """
    if not isinstance(dataset_name, str):
        if len(dataset_name) != 1:
            raise ValueError(f"evaluate one data set at a time, not {list(dataset_name)}")
        (dataset_name,) = dataset_name
    name = register_if_file(dataset_name)
    with tempfile.TemporaryDirectory() as folder:  # the evaluators read at once
        if _has_coco_json(name):
            checked = _load_checked(name)
            if checked.changed:
                name = _register_changed(name, checked, folder)
        evaluator = COCOEvaluator(name, ("bbox",), output_dir=output_dir)
        if not unsuppressed:
            return evaluator
        other_dir = output_dir and os.path.join(output_dir, "unsuppressed")
        other = COCOEvaluator(name, ("bbox",), output_dir=other_dir)
    return DatasetEvaluators([evaluator, UnsuppressedEvaluator(other)])


class UnsuppressedEvaluator(DatasetEvaluator):
    """Another evaluator's results for the detections before suppression, if there was any."""

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator

    def reset(self) -> None:
        """Forget all images."""
        self.evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Pass on what was there before suppression."""
        before = [output.get("unsuppressed", output["instances"]) for output in outputs]
        self.evaluator.process(inputs, [{"instances": found} for found in before])

    def evaluate(self) -> dict | None:
        """The results, by other names."""
        results = self.evaluator.evaluate()
        return results and {f"{task}_unsuppressed": found for task, found in results.items()}


def lvis_evaluator(
    dataset_name: str,
    output_dir: str | None = None,
    max_detections: int = 300,
    unsuppressed: bool = False,
) -> DatasetEvaluator:
    """Detectron2's LVISEvaluator for boxes on a registered data set.

    Args:
        max_detections: per image; 300 by LVIS's rules, 1000 in Co-DETR's published results.
        unsuppressed: see `coco_evaluator`.

    Raises:
        ImportError: the package `lvis` is not installed.
    """
    try:
        import lvis.eval
    except ImportError as error:
        raise ImportError("LVIS's evaluation needs its package: pip install lvis") from error
    if not hasattr(np, "float"):  # NumPy 1.24 took away a name that lvis 0.5 uses
        lvis.eval.np = SimpleNamespace(**vars(np), float=float)
    limit = {"max_dets_per_image": max_detections}
    evaluator = LVISEvaluator(dataset_name, ("bbox",), output_dir=output_dir, **limit)
    if not unsuppressed:
        return evaluator
    other_dir = output_dir and os.path.join(output_dir, "unsuppressed")
    other = LVISEvaluator(dataset_name, ("bbox",), output_dir=other_dir, **limit)
    return DatasetEvaluators([evaluator, UnsuppressedEvaluator(other)])


def check_num_classes(
    names: str | Sequence[str], num_classes: int, key: str = "model.detector.num_classes="
) -> None:
    """Compare a model's classes with those of the data sets, before they ruin a run.

    Args:
        key: how to set them, for the message.

    Raises:
        ValueError: a data set has another number of classes.
    """
    for name in [names] if isinstance(names, str) else names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"data set {name!r} has {len(classes)} classes ({', '.join(classes[:5])}...), the "
                f"model has {num_classes}; set {key}{len(classes)}"
            )


def class_frequencies(name: str, power: float = 1.0) -> list[float]:
    """(K,) how many images of a data set have each class, as its metadata say, to the power.

    Raises:
        ValueError: the metadata do not say; LVIS's do.
    """
    counts = MetadataCatalog.get(name).get("class_image_count")
    if counts is None:
        raise ValueError(f"data set {name!r} has no class_image_count in its metadata")
    by_class = sorted(counts, key=lambda entry: entry["id"])
    return [entry["image_count"] ** power for entry in by_class]


def class_names(given: str, names: str | Sequence[str]) -> ClassNames:
    """The classes of weights, as `read_class_names` takes them, and of loaded data sets.

    Raises:
        ValueError: no data set is named.
    """
    if not names:
        raise ValueError(
            "train.init_classes needs the names of data sets in dataloader.train.dataset.names "
            "(in yacs, MODEL.WEIGHTS_CLASSES needs DATASETS.TRAIN)"
        )
    name = names if isinstance(names, str) else names[0]
    return ClassNames(read_class_names(given), MetadataCatalog.get(name).thing_classes)


def _load(name: str, masks: bool) -> list[dict]:
    """The checked dicts of one registered data set."""
    if _has_coco_json(name):
        return _load_coco(name, masks)
    sources = DatasetCatalog.get(name)
    annotated = bool(sources) and "annotations" in sources[0]
    return _check_dicts(name, sources) if annotated else sources


def _load_coco(name: str, masks: bool = False) -> list[dict]:
    checked = _load_checked(name)
    _log(checked.findings)
    return to_dicts(checked, masks)


def _has_coco_json(name: str) -> bool:
    """Whether a data set is a COCO-format json with annotations; COCO's others are "image_info"."""
    metadata = MetadataCatalog.get(name)
    json = str(metadata.get("json_file", ""))
    return metadata.get("evaluator_type") == "coco" and json != "" and "image_info" not in json


def _load_checked(name: str) -> Checked:
    """A data set's json, and its classes in Detectron2's metadata."""
    metadata = MetadataCatalog.get(name)
    checked = load_checked(metadata.json_file, metadata.image_root, metadata.get("file_parts"))
    absent = set(metadata.get("absent_files") or ())
    for image in checked.content["images"]:
        if image["file_name"] in absent:
            reason = "image that the data set names but does not have"
            checked.findings.add("dropped", reason, image["file_name"])
    content = select_images(checked.content, lambda image: image["file_name"] not in absent)
    checked = checked._replace(content=content)
    ids = [category["id"] for category in checked.content["categories"]]
    metadata.set(
        thing_classes=checked.classes,
        thing_dataset_id_to_contiguous_id={number: i for i, number in enumerate(ids)},
    )
    return checked


def to_dicts(checked: Checked, masks: bool = False) -> list[dict]:
    """Detectron2's dicts of a checked data set, in the order of the image ids, on request with the
    masks that there are.
    """
    names = ("iscrowd", "bbox", "segmentation") if masks else ("iscrowd", "bbox")
    numbers = {c["id"]: i for i, c in enumerate(checked.content["categories"])}
    found = {
        image["id"]: {
            "file_name": str(checked.images / image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sorted(checked.content["images"], key=lambda image: image["id"])
    }
    for entry in checked.content["annotations"]:
        fields = {name: entry[name] for name in names if name in entry}
        number = numbers[entry["category_id"]]
        fields |= {"category_id": number, "bbox_mode": BoxMode.XYWH_ABS}
        found[entry["image_id"]]["annotations"].append(fields)
    return list(found.values())


def _check_dicts(name: str, sources: list[dict]) -> list[dict]:
    """Check what a registered function returned, by the rules for jsons."""
    findings = Findings(f"data set {name!r}")
    entries = [
        {**entry, "id": number, "image_id": source["image_id"], "bbox": _as_xywh(entry)}
        for number, (source, entry) in enumerate(
            ((source, entry) for source in sources for entry in source["annotations"]), start=1
        )
    ]
    classes = MetadataCatalog.get(name).get("thing_classes", ())
    content = {
        "images": [{**source, "id": source["image_id"]} for source in sources],
        "annotations": entries,
        "categories": [{"id": i, "name": class_name} for i, class_name in enumerate(classes)],
    }
    kept = {entry["id"] for entry in check_annotations(content, findings)["annotations"]}
    findings.raise_errors()
    _log(findings)
    number = iter(range(1, len(entries) + 1))
    return [
        {**source, "annotations": [e for e in source["annotations"] if next(number) in kept]}
        for source in sources
    ]


def _as_xywh(entry: dict) -> list[float] | None:
    box = entry.get("bbox")
    if box is None or len(box) != 4:
        return box
    return list(map(float, BoxMode.convert(list(box), entry["bbox_mode"], BoxMode.XYWH_ABS)))


def _register_changed(name: str, checked: Checked, folder: str) -> str:
    """Write what is usable of a data set into a folder and give it a name of its own."""
    alias = f"{name} (checked)"
    path = Path(folder) / "annotations.json"
    write_annotations(checked.content, path)
    metadata = MetadataCatalog.get(name).as_dict() | {"json_file": str(path), "name": alias}
    if alias in MetadataCatalog:
        MetadataCatalog.remove(alias)
    MetadataCatalog.get(alias).set(**metadata)
    return alias


def _log(findings: Findings) -> None:
    for finding in findings.all():
        level = logging.INFO if finding.level == "note" else logging.WARNING
        logger.log(level, "%s: %s", findings.source, finding)
